"""Batches to a budget of tokens."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import DataLoader

from fastdpo.data import PairCollator, TokenBudgetSampler, micro_batches

LAYOUTS = ("padded", "packed", "shared_prompts")


def examples(count=200, seed=0):
    rng = random.Random(seed)

    def ids(most):
        return [rng.randrange(1, 90) for _ in range(rng.randint(1, most))]

    return [
        {"prompt_ids": ids(40), "chosen_ids": ids(30), "rejected_ids": ids(30)}
        for _ in range(count)
    ]


def sampler(layout="shared_prompts", budget=400, count=200, attention="sdpa", **options):
    collator = PairCollator(0, layout, attention=attention)
    return TokenBudgetSampler(examples(count), collator, budget, **options)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_and_within_the_budget(layout, attention, shuffle):
    data = examples()
    collator = PairCollator(0, layout, attention=attention)
    batches = list(TokenBudgetSampler(data, collator, 400, shuffle=shuffle))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    tokens = [collator([data[i] for i in batch])["input_ids"].numel() for batch in batches]
    assert max(tokens) <= 400
    if not shuffle:
        assert [i for batch in batches for i in batch] == list(range(200))
    else:  # lengths that are alike leave little room
        assert sum(tokens) / len(tokens) > 300


def test_sorting_pads_less():
    data, collator = examples(400), PairCollator(0)
    padded = {
        shuffle: sum(
            collator([data[i] for i in batch])["input_ids"].numel()
            for batch in TokenBudgetSampler(data, collator, 800, shuffle=shuffle)
        )
        for shuffle in (True, False)
    }
    assert padded[True] < 0.85 * padded[False]


def test_the_order_follows_from_seed_and_epoch():
    first, same = sampler(), sampler()
    assert list(first) == list(same) == list(first)
    assert list(sampler(seed=1)) != list(first)
    before = list(first)
    first.set_epoch(1)
    assert list(first) != before
    first.set_epoch(0)
    assert list(first) == before


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("replicas", [2, 3, 7])
def test_processes_take_turns(replicas, drop_last):
    parts = [
        sampler(num_replicas=replicas, rank=rank, drop_last=drop_last) for rank in range(replicas)
    ]
    taken = [list(part) for part in parts]
    assert len({len(t) for t in taken}) == 1
    assert {len(part) for part in parts} == {len(taken[0])}
    seen = [i for part in taken for batch in part for i in batch]
    if drop_last:
        assert len(seen) == len(set(seen))
    else:
        assert set(seen) == set(range(200))
    # What one step waits for is of like lengths.
    part = parts[0]
    for step in list(zip(*taken, strict=True))[:-1]:
        lengths = [part._length(i) for batch in step for i in batch]
        assert max(lengths) - min(lengths) <= 40


def test_fewer_batches_than_processes():
    parts = [list(sampler(count=2, num_replicas=5, rank=rank)) for rank in range(5)]
    assert all(len(part) == 1 for part in parts)
    assert len(sampler(count=0, num_replicas=5)) == 0


def test_it_goes_on_where_it_was():
    whole = list(sampler())
    part = sampler()
    part.set_epoch(0)
    iterator = iter(part)
    head = [next(iterator) for _ in range(5)]
    state = part.state_dict()
    again = sampler()
    again.load_state_dict(state)
    assert head + list(again) == whole
    assert list(again) == whole  # the next time from the beginning
    other = r"state should be of this sampler, which has \{'seed': 1\}"
    with pytest.raises(ValueError, match=other):
        sampler(seed=1).load_state_dict(state)
    # Rows that are laid out otherwise make other batches.
    assert list(sampler(attention="flex_attention")) != whole
    with pytest.raises(ValueError, match=r"which has \{'one_row': True\}"):
        sampler(attention="flex_attention").load_state_dict(state)


def test_a_look_at_the_first_batch_takes_nothing_away():
    whole, part = list(sampler()), sampler()
    assert next(iter(part)) == whole[0]
    assert list(part) == whole
    for number, _ in enumerate(part):  # one that ends in the middle, beside another
        if number == 2:
            break
    iterator = iter(part)
    assert next(iterator) == whole[0]
    assert list(part) == whole
    assert list(iterator) == whole[1:]


def test_in_a_data_loader():
    data, collator = examples(), PairCollator(0, "shared_prompts")
    batches = TokenBudgetSampler(data, collator, 400)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collator)
    count = 0
    for batch, own in zip(loader, list(batches), strict=True):
        torch.testing.assert_close(batch, collator([data[i] for i in own]))
        count += len(own)
    assert count == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "max_tokens_per_batch should be an integer of at least 1"),
        ({"budget": 30}, r"max_tokens_per_batch should be at least \d+, which examples\[0\] has"),
        ({"num_replicas": 0}, "num_replicas should be"),
        ({"num_replicas": 2, "rank": 2}, "rank should be less than num_replicas=2, got 2"),
        ({"seed": -1}, "seed should be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches(layout):
    data, collator = examples(40), PairCollator(0, layout)
    parts = micro_batches(data, collator, 300)
    assert sorted(id(e) for part in parts for e in part) == sorted(map(id, data))
    tokens = [collator(part)["input_ids"].numel() for part in parts]
    assert max(tokens) <= 300
    longest = [max(collator(part)["input_ids"].shape[1] for _ in part) for part in parts]
    assert longest == sorted(longest, reverse=True)
    assert micro_batches([], collator, 300) == []
    with pytest.raises(ValueError, match="max_tokens_per_batch should be at least"):
        micro_batches(data, collator, 30)
