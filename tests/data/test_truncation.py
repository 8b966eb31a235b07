"""Cutting a pair to a length: both sequences keep one prompt, and something is left of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.data.truncation import truncate as truncate_answers


def truncate(prompt, chosen, rejected, *options):
    prompt, (chosen, rejected) = truncate_answers(prompt, [chosen, rejected], *options)
    return prompt, chosen, rejected


PAIR = [1, 2, 3, 4], [5, 6, 7], [8]


@pytest.mark.parametrize(
    ("length", "mode", "expected"),
    [
        (None, "keep_start", PAIR),
        (7, "keep_start", PAIR),
        (6, "keep_start", ([1, 2, 3, 4], [5, 6], [8])),
        (5, "keep_start", ([1, 2, 3, 4], [5], [8])),
        (None, "keep_end", PAIR),
        (7, "keep_end", PAIR),
        (6, "keep_end", ([2, 3, 4], [5, 6, 7], [8])),
        (4, "keep_end", ([4], [5, 6, 7], [8])),
    ],
)
def test_what_is_cut(length, mode, expected):
    assert truncate(*PAIR, length, mode) == expected
    prompt, chosen, rejected = PAIR
    swapped = (expected[0], expected[2], expected[1])
    assert truncate(prompt, rejected, chosen, length, mode) == swapped


@pytest.mark.parametrize(
    ("length", "mode", "message"),
    [
        (4, "keep_start", "the prompt has 4 tokens, and max_length 4 leaves nothing of the answ"),
        (
            3,
            "keep_end",
            "the longest answer has 3 tokens, and max_length 3 leaves nothing of the p",
        ),
        (1, "keep_start", "max_length should be"),
        (True, "keep_start", "max_length should be"),
        (8.0, "keep_start", "max_length should be"),
        (8, "keep_middle", "truncation_mode should be one of keep_start, keep_end, got 'keep_mid"),
        (None, "left", "truncation_mode should be"),
    ],
)
def test_what_cannot_be_cut(length, mode, message):
    with pytest.raises(ValueError, match=message):
        truncate(*PAIR, length, mode)


ids = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(ids, ids, ids, st.integers(2, 20), st.sampled_from(["keep_start", "keep_end"]))
def test_it_fits_and_nothing_is_cut_that_need_not_be(prompt, chosen, rejected, length, mode):
    try:
        p, c, r = truncate(prompt, chosen, rejected, length, mode)
    except ValueError:
        longer = max(len(chosen), len(rejected))
        assert (len(prompt) if mode == "keep_start" else longer) >= length
        return
    assert p
    assert c
    assert r
    assert max(len(p) + len(c), len(p) + len(r)) <= length
    if mode == "keep_start":
        assert p == prompt
        assert prompt + c == (prompt + chosen)[:length]
        assert prompt + r == (prompt + rejected)[:length]
    else:
        assert (c, r) == (chosen, rejected)
        assert p == prompt[-len(p) :]
        assert p == prompt or len(p) + max(len(c), len(r)) == length


def test_where_an_answer_is_left_it_is_what_trl_s_collator_keeps():
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    for length in (5, 6, 7, 8):
        collator = trainer.DataCollatorForPreference(0, length, "keep_start")
        batch = collator([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), PAIR, strict=1))])
        prompt, *answers = truncate(*PAIR, length)
        for row, answer in enumerate(answers):
            kept = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][kept].tolist() == prompt + answer
            assert batch["completion_mask"][row].sum() == len(answer)
