"""Where a collator puts the tokens of pairs, in each layout."""

from __future__ import annotations

import random

import pytest
import torch

from fastdpo.data import CompletionCollator, PairCollator, RankingCollator, truncate
from fastdpo.data.layouts import filled

PAD = 0


def examples(sizes, seed=0, **columns):
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(1, 90) for _ in range(n)]

    return [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r), **columns}
        for p, c, r in sizes
    ]


SIZES = [(6, 5, 3), (2, 7, 6), (9, 1, 4), (1, 4, 4), (3, 2, 8)]


def sequences_of(pairs):
    return [(e["prompt_ids"], e[f"{side}_ids"]) for side in ("chosen", "rejected") for e in pairs]


def rebuilt(batch):
    """Every sequence of a packed batch, as the tokens that its last token sees, and its loss."""
    document, place = batch["document_ids"], batch["position_ids"]
    branch = batch.get("branch_ids")
    length = batch["input_ids"].shape[1]
    lengths = batch["row_lengths"].tolist()
    found, start = [], 0
    for s, count in enumerate(lengths):
        index = batch["row_index"][start : start + count]
        labels = batch["row_labels"][start : start + count]
        start += count
        row, columns = int(index[0]) // length, index % length
        assert (index // length == row).all()
        own = document[row] == document[row, columns[0]]
        if branch is not None:
            own &= (branch[row] == 0) | (branch[row] == 1 + s // (len(lengths) // 2))
        tokens = batch["input_ids"][row][own]
        assert place[row][own].tolist() == list(range(len(tokens)))
        # Each label is the token at the position after the one that predicts it.
        assert place[row][columns].tolist() == list(range(len(tokens) - count - 1, len(tokens) - 1))
        assert labels.tolist() == tokens[-count:].tolist()
        found.append((tokens[:-count].tolist(), tokens[-count:].tolist()))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("layout", ["packed", "shared_prompts"])
def test_rows_hold_the_sequences(layout, attention):
    pairs = examples(SIZES)
    batch = PairCollator(PAD, layout, attention=attention)(pairs)
    assert rebuilt(batch) == sequences_of(pairs)
    used = (batch["document_ids"] >= 0).sum()
    sizes = [(1, 1) if layout == "shared_prompts" else (2, 1)]
    ((prompts, answers),) = sizes
    assert used == sum(prompts * p + answers * (c + r) for p, c, r in SIZES)
    assert (batch["input_ids"][batch["document_ids"] < 0] == PAD).all()
    if attention == "flex_attention":
        assert batch["input_ids"].shape == (1, used)
    else:
        longest = max(p + (c + r if layout == "shared_prompts" else max(c, r)) for p, c, r in SIZES)
        assert batch["input_ids"].shape[1] == longest


def test_a_shared_prompts_last_token_predicts_both_answers():
    batch = PairCollator(PAD, "shared_prompts")(examples([(4, 3, 2)]))
    assert batch["row_index"].tolist() == [3, 4, 5, 3, 7]
    assert batch["branch_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5]]


def test_padded_is_what_trl_collates():
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    pairs = examples(SIZES, ref_chosen_logps=-1.5, ref_rejected_logps=-2.5)
    theirs = trl.DataCollatorForPreference(pad_token_id=PAD)([dict(e) for e in pairs])
    ours = PairCollator(PAD)(pairs)
    row_index = ours.pop("row_index")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0)
    predicted = ours["completion_mask"].flatten().nonzero().squeeze(1)
    assert (row_index + 1 == predicted).all()


def test_flash_attention_gets_the_ends_of_its_sequences():
    batch = PairCollator(PAD, "packed", attention="flash_attention_2", pad_to_multiple_of=64)(
        examples([(2, 3, 1), (4, 1, 1)])
    )
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 13, 18, 64]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["cu_seq_lens_k"] == batch["cu_seq_lens_q"]).all()
    assert batch["max_length_q"] == batch["max_length_k"] == 46
    assert batch["input_ids"].shape == (1, 64)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompts"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_tokens_are_counted_before_they_are_collated(layout, attention, multiple):
    collator = PairCollator(PAD, layout, attention=attention, pad_to_multiple_of=multiple)
    pairs = examples(SIZES)
    lengths = [collator.length_of(e) for e in pairs]
    assert lengths[0] == (6, (5, 3))
    ids = collator(pairs)["input_ids"]
    assert collator.tokens_in(lengths) == ids.numel()
    assert ids.shape[1] % multiple == 0


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompts"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation(layout, mode):
    pairs = examples([(6, 5, 3), (2, 1, 1)])
    batch = PairCollator(PAD, layout, max_length=8, truncation_mode=mode)(pairs)
    lengths = [2, 1, 2, 1] if mode == "keep_start" else [5, 1, 3, 1]
    if layout == "padded":
        assert batch["completion_mask"].sum(-1).tolist() == lengths
        first = batch["input_ids"][0].tolist()
    else:
        assert batch["row_lengths"].tolist() == lengths
        prompt, answer = rebuilt(batch)[0]
        first = prompt + answer
    whole = pairs[0]["prompt_ids"] + pairs[0]["chosen_ids"]
    assert first == (whole[:8] if mode == "keep_start" else whole[3:])


def test_truncation_leaves_one_prompt_to_all_answers():
    assert truncate([1, 2, 3], [[4, 5], [6]], 4, "keep_end") == ([2, 3], [[4, 5], [6]])
    assert truncate([1, 2, 3], [[4, 5], [6]], 4, "keep_start") == ([1, 2, 3], [[4], [6]])
    assert truncate([1, 2, 3], [[4, 5], [6]], 5) == ([1, 2, 3], [[4, 5], [6]])


def test_rows_are_filled_from_the_longest():
    assert filled([3, 9, 4, 2, 6], 9) == [[1], [0, 4], [2, 3]]
    assert filled([], 4) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, r"examples\[1\]\['prompt_ids'\] should be token ids, at least one"),
        ({"chosen_ids": []}, r"examples\[1\]\['chosen_ids'\] should be token ids, at least one"),
        ({"rejected_ids": "text"}, r"examples\[1\]\['rejected_ids'\] should be token ids"),
        ({"rejected_ids": [3, -100]}, r"examples\[1\]\['rejected_ids'\].*at least 0"),
        ({"ref_chosen_logps": -1.0}, "examples.0. should have 'ref_chosen_logps'"),
    ],
)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompts"])
def test_examples_that_cannot_be_collated(layout, change, message):
    first, second = examples([(3, 2, 2), (3, 2, 2)])
    with pytest.raises(ValueError, match=message):
        PairCollator(PAD, layout)([first, {**second, **change}])


def test_an_example_without_one_of_the_references():
    pairs = examples([(3, 2, 2)], ref_chosen_logps=-1.0)
    with pytest.raises(ValueError, match="should have 'ref_rejected_logps'"):
        PairCollator(PAD)(pairs)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_reference_of_more_than_is_left(mode):
    """Its rows have a number for each token of the answers that it is of."""
    known = {"ref_chosen_logps": -3.0, "ref_rejected_logps": -2.0}
    tokens = {"ref_chosen_token_logps": [-1.0] * 3, "ref_rejected_token_logps": [-1.0] * 2}
    pairs = examples([(4, 3, 2)], **known, **tokens)
    for length in (None, 7):
        assert PairCollator(PAD, max_length=length, truncation_mode=mode)(pairs)["ref_chosen_logps"]
    with pytest.raises(ValueError, match=r"examples\[0\] should be what its reference is of, 3 t"):
        PairCollator(PAD, max_length=6, truncation_mode=mode)(pairs)
    # Of whoever has sums alone nothing is known.
    PairCollator(PAD, max_length=6, truncation_mode=mode)(examples([(4, 3, 2)], **known))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_nothing_is_left_of_an_answer_or_a_prompt(mode):
    sizes = (8, 3, 3) if mode == "keep_start" else (3, 8, 3)
    with pytest.raises(
        ValueError, match=r"examples\[0\]: the .* tokens, and max_length 8 leaves nothing"
    ):
        PairCollator(PAD, max_length=8, truncation_mode=mode)(examples([sizes]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "ragged"}, "layout should be one of"),
        ({"attention": "xformers"}, "attention should be one of"),
        ({"layout": "shared_prompts", "attention": "flash_attention_2"}, "no branches"),
        ({"max_length": 1}, "max_length should be None or an integer of at least 2"),
        ({"truncation_mode": "keep"}, "truncation_mode should be one of"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of should be"),
        ({"pad_token_id": None}, "pad_token_id should be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(**{"pad_token_id": PAD, **options})


def test_no_examples():
    with pytest.raises(ValueError, match="examples should not be empty"):
        PairCollator(PAD)([])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompts"])
def test_rankings(layout):
    ranked = [
        {
            "prompt_ids": e["prompt_ids"],
            "answer_ids": [e["chosen_ids"], e["rejected_ids"], [7, 8]],
            "ref_logps": [-1.0 - i, -2.0 - i, -3.0 - i],
        }
        for i, e in enumerate(examples(SIZES[:2]))
    ]
    batch = RankingCollator(PAD, layout)(ranked)
    assert batch["ref_logps"].tolist() == [-1.0, -2.0, -2.0, -3.0, -3.0, -4.0]
    lengths = [len(e["answer_ids"][k]) for k in range(3) for e in ranked]
    if layout == "padded":
        assert batch["completion_mask"].sum(-1).tolist() == lengths
    else:
        assert batch["row_lengths"].tolist() == lengths
        flat = [token for k in range(3) for e in ranked for token in e["answer_ids"][k]]
        assert batch["row_labels"].tolist() == flat
    if layout == "shared_prompts":
        assert batch["branch_ids"].max() == 3
        assert (batch["row_index"].bincount() == 3).sum() == 2  # a prompt's last token, each


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompts"])
def test_single_answers(layout):
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "ref_logps": -1.0},
        {"prompt_ids": [4], "completion_ids": [5, 6], "label": False, "ref_logps": -2.0},
        {"prompt_ids": [4], "completion_ids": [7], "label": 1, "ref_logps": -3.0},
    ]
    batch = CompletionCollator(PAD, layout)(rows)
    assert batch["desirable"].tolist() == [True, False, True]
    assert batch["ref_logps"].tolist() == [-1.0, -2.0, -3.0]
    assert batch["desirable"].dtype == torch.bool


def test_weights_of_examples():
    pairs = examples(SIZES[:2], sample_weight=0.5)
    assert PairCollator(PAD)(pairs)["sample_weights"].tolist() == [0.5, 0.5]
    del pairs[1]["sample_weight"]
    with pytest.raises(ValueError, match=r"examples\[1\] should have 'sample_weight'"):
        PairCollator(PAD)(pairs)


@pytest.mark.parametrize(
    ("collator", "example", "message"),
    [
        (RankingCollator, {"answer_ids": [[3]]}, r"\['answer_ids'\] should be two or more answers"),
        (RankingCollator, {}, r"\['answer_ids'\] should be two or more answers"),
        (
            RankingCollator,
            {"answer_ids": [[3], []]},
            r"\['answer_ids'\]\['1'\] should be token ids",
        ),
        (
            RankingCollator,
            {"answer_ids": [[3], [4]], "ref_logps": [-1.0]},
            r"\['ref_logps'\] should be 2 numbers, got 1",
        ),
        (CompletionCollator, {"completion_ids": [3]}, r"\['label'\] should be True or False"),
        (
            CompletionCollator,
            {"completion_ids": [3], "label": 2},
            r"\['label'\] should be True or False",
        ),
        (CompletionCollator, {"label": True}, "should have the key 'completion_ids'"),
    ],
)
def test_other_examples_that_cannot_be_collated(collator, example, message):
    with pytest.raises(ValueError, match=message):
        collator(PAD)([{"prompt_ids": [1, 2], **example}])


def test_rankings_of_different_lengths():
    rows = [{"prompt_ids": [1], "answer_ids": [[2]] * k} for k in (2, 3)]
    with pytest.raises(ValueError, match=r"the same number of answers, got \[2, 3\]"):
        RankingCollator(PAD)(rows)
