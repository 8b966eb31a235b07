"""The demo's parts: pairs, batches, metrics, memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import build

from fastdpo.demo import collate, memory, synthetic
from fastdpo.demo import model as models
from fastdpo.demo.collate import Example
from fastdpo.demo.evaluate import Evaluator
from fastdpo.demo.options import InputError, Options
from fastdpo.demo.pairs import Pair, read_pairs
from fastdpo.demo.setting import Setting
from fastdpo.demo.train import dpo_step, step_metrics

CPU = torch.device("cpu")
EXAMPLES = [
    Example([5, 6, 7], [8, 9], [10, 11, 12, 13], "rude", frozenset(), -3.0, -8.0),
    Example([14, 15], [16, 17, 18], [19], "wrong", frozenset(), -5.0, -2.0),
    Example([20], [21], [22, 23], "rude", frozenset(), -1.0, -4.0),
]


def setting(**options) -> Setting:
    return Setting(Options(batch_size=2, **options), CPU, 0)


def test_synthetic_pairs_are_what_they_claim():
    pairs = synthetic.make_pairs(500, seed=3)
    assert pairs == synthetic.make_pairs(500, seed=3)
    assert pairs != synthetic.make_pairs(500, seed=4)
    assert len({str(pair) for pair in pairs}) == 500
    assert set(Counter(pair.flaw for pair in pairs).values()) == {100}
    for pair in pairs:
        assert pair.chosen[0]["content"] in pair.good
        assert pair.rejected[0]["content"] not in pair.good


def test_batches_are_chosen_then_rejected_and_only_answers_carry_loss():
    batch = collate.collate(EXAMPLES, 0, CPU)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 0, 0],
        [14, 15, 16, 17, 18, 0, 0],
        [20, 21, 0, 0, 0, 0, 0],
        [5, 6, 7, 10, 11, 12, 13],
        [14, 15, 19, 0, 0, 0, 0],
        [20, 22, 23, 0, 0, 0, 0],
    ]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    labels = collate.labels_of(batch)
    assert [row[row != -100].tolist() for row in labels] == [
        [8, 9],
        [16, 17, 18],
        [21],
        [10, 11, 12, 13],
        [19],
        [22, 23],
    ]
    assert batch["ref_chosen_logps"].tolist() == [-3, -5, -1]
    assert batch["ref_rejected_logps"].tolist() == [-8, -2, -4]


def encoded(tokenizer, *pair, max_length=64):
    return collate.encode_all([Pair(*pair)] * 2, tokenizer, max_length)[0]


def test_plain_text_ends_with_the_end_token_and_templates_end_themselves():
    tokenizer = models.make_tokenizer(["say a word", "another word"])
    plain = encoded(tokenizer, "say", " word", " another word")
    assert tokenizer.decode(plain.prompt_ids) == "say"
    assert tokenizer.decode(plain.chosen_ids) == " word<|end|>"
    messages = [{"role": "user", "content": "say"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("word", "another")]
    chat = encoded(tokenizer, messages, *answers)
    assert tokenizer.decode(chat.prompt_ids) == "<|user|>say<|end|><|assistant|>"
    assert tokenizer.decode(chat.rejected_ids) == "another<|end|>"
    tokenizer.chat_template = None
    bare = encoded(tokenizer, messages, *answers)
    assert tokenizer.decode(bare.prompt_ids) == "user: say\nassistant:"
    assert tokenizer.decode(bare.chosen_ids) == " word<|end|>"


def test_long_answers_are_cut_and_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = models.make_tokenizer(["a b c d"])
    cut = encoded(tokenizer, "a", " b c d" * 9, " b", max_length=8)
    assert len(cut.prompt_ids) + len(cut.chosen_ids) == 8
    tokenizer.chat_template = "{{ messages | length }}{% if add_generation_prompt %}?{% endif %}"
    messages = [{"role": "user", "content": "a"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("b", "c")]
    pair = Pair(messages, *answers, where="pairs.jsonl, line 7")
    with pytest.raises(InputError, match=r"^pairs\.jsonl, line 7: the chat template changes"):
        collate.encode_all([pair], tokenizer, 8)


def test_pairs_that_truncation_leaves_nothing_of_are_dropped_and_counted():
    tokenizer = models.make_tokenizer(["a b c d"])
    pairs = [Pair("a", " b", " c"), Pair("a b c d" * 9, " b", " c"), Pair("a", " d", " c")]
    with pytest.warns(UserWarning, match="1 of 3 pairs are too long"):
        kept = collate.encode_all(pairs, tokenizer, 8)
    assert [tokenizer.decode(example.chosen_ids) for example in kept] == [" b<|end|>", " d<|end|>"]


def test_every_step_logs_what_the_models_own_logits_say():
    model, case = build("Llama"), setting(beta=0.3)
    batch = collate.collate(EXAMPLES, 0, CPU)
    got = step_metrics(dpo_step(model, batch, case), batch)

    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = collate.labels_of(batch)[:, 1:]
    carries, all_logps = labels != -100, logits[:, :-1].log_softmax(-1)
    logps = all_logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * carries
    chosen, rejected = logps.sum(-1).chunk(2)
    rewards = (
        0.3 * (chosen - batch["ref_chosen_logps"]),
        0.3 * (rejected - batch["ref_rejected_logps"]),
    )
    means = logits[:, :-1].mean(-1)
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    expected = {
        "loss": -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).mean(),
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "logits/chosen": means[:3][carries[:3]].mean(),
        "logits/rejected": means[3:][carries[3:]].mean(),
        "entropy": entropy[carries].mean(),
        "mean_token_accuracy": (logits[:, :-1].argmax(-1) == labels)[carries].float().mean(),
    }
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_evaluation_counts_wins_and_half_of_every_tie():
    model = build("Llama")
    model.train()
    result = Evaluator(EXAMPLES, setting())(model)
    assert model.training
    batch = collate.collate(EXAMPLES, 0, CPU)
    labels = collate.labels_of(batch)[:, 1:]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (logps * (labels != -100)).sum(-1).chunk(2)
    lengths = (labels != -100).sum(-1).chunk(2)
    wins = (chosen / lengths[0] > rejected / lengths[1]).float()
    margins = (chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"])
    assert result.preference_accuracy == pytest.approx(wins.mean().item())
    assert result.reward_accuracy == pytest.approx((margins > 0).float().mean().item())
    assert result.reward_margin == pytest.approx(0.5 * margins.mean().item(), rel=1e-4)
    assert result.by_flaw == {
        "rude": pytest.approx((wins[0] + wins[2]).item() / 2),
        "wrong": pytest.approx(wins[1].item()),
    }
    same = [Example([5], [6, 7], [6, 7], "", frozenset(), -1.0, -1.0)]
    tied = Evaluator(same, setting())(model)
    assert tied.preference_accuracy == tied.reward_accuracy == 0.5


def test_peak_memory_is_the_most_that_was_held_at_once():
    megabyte = 1 << 20

    def one_after_the_other():
        for _ in range(5):
            torch.empty(megabyte, dtype=torch.uint8)

    def together():
        kept = [torch.empty(megabyte, dtype=torch.uint8) for _ in range(3)]
        del kept
        torch.empty(megabyte, dtype=torch.uint8)

    held = torch.empty(7 * megabyte, dtype=torch.uint8)  # before the step: not counted
    assert memory.peak_bytes(one_after_the_other, CPU) == megabyte
    assert memory.peak_bytes(together, CPU) == 3 * megabyte
    assert memory.peak_bytes(lambda: None, CPU) == 0
    del held


def test_the_eager_loss_that_memory_is_compared_with_is_the_same_loss():
    model, case = build("Llama"), setting(beta=0.3)
    batch = collate.collate(EXAMPLES, 0, CPU)
    torch.testing.assert_close(
        memory.eager(model, batch, case), dpo_step(model, batch, case).loss, rtol=1e-5, atol=1e-5
    )
    measured = memory.measure(model, batch, case, "tiny")
    assert measured.vocab_size == 53
    assert min(measured.eager, measured.fastdpo) > 0
    assert all(p.grad is None for p in model.parameters())


def test_batches_cover_every_example_once_an_epoch_and_depend_on_the_seed():
    examples = [Example([i], [i + 1], [i + 2]) for i in range(3, 13)]

    def prompts(seed):
        batches = setting().batches(examples, 10, seed)
        return [row for batch in batches for row in batch["input_ids"][:2, 0].tolist()]

    first = prompts(0)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(3, 13))
    assert first == prompts(0) != prompts(1)


def test_a_made_model_is_small_and_its_tokenizer_gives_every_text_back():
    texts = ["Sure! The capital of Peru is Lima.", "Grüße, naïve 🙂\n\ttabs"]
    tokenizer = models.make_tokenizer(texts[:1])
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = models.make_model(tokenizer, 512)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "--seed should be at least 0"),
        ({"lr": float("inf")}, "--lr should be positive"),
        ({"output": Path(__file__) / "below"}, "--output .* cannot be made"),
    ],
)
def test_options_that_cannot_be(changed, message):
    with pytest.raises(InputError, match=message):
        Options(**changed).check()


def test_a_pair_may_hold_other_ends_of_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "a\u2028b", "chosen": "c\x85", "rejected": "d"}
    path.write_text("\n".join([json.dumps(row, ensure_ascii=False)] * 2) + "\n", encoding="utf-8")
    assert read_pairs(path)[1].prompt == "a\u2028b"
