"""The preference loss on a Hugging Face model: references, batches, objectives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hf_models import assert_same_gradients, batch, build, eager_token_logps, gradients
from test_hf_capture import disturb, lora

from fastdpo.integrations import hf

BETA = 0.2


def preference_batch(padding="right", **extra):
    input_ids, attention_mask, labels = batch(sequences=6, padding=padding)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **extra}


def eager(model, pairs):
    rest = {k: v for k, v in pairs.items() if k not in ("input_ids", "labels")}
    return eager_token_logps(model, pairs["input_ids"], pairs["labels"], **rest).sum(-1)


def eager_sigmoid(policy, reference):
    ratios = policy - reference
    return -F.logsigmoid(BETA * (ratios[:3] - ratios[3:])).mean()


@pytest.fixture
def models():
    model, reference = build("Gemma2"), build("Gemma2")
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model, reference


@pytest.mark.parametrize("padding", ["right", "left"])
def test_loss_rewards_and_gradients_against_eager(models, padding):
    model, reference = models
    pairs = preference_batch(padding)
    with torch.no_grad():
        ref = eager(reference, pairs)
    policy = eager(model, pairs)
    expected = eager_sigmoid(policy, ref)
    expected.backward()
    expected_grads = gradients(model)

    out = hf.dpo_loss(model, pairs, reference, beta=BETA)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model), expected_grads)
    assert all(p.grad is None for p in reference.parameters())
    logps = torch.cat([out.chosen_logps, out.rejected_logps])
    rewards = torch.cat([out.chosen_rewards, out.rejected_rewards])
    torch.testing.assert_close(logps, policy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rewards, BETA * (policy - ref).detach(), rtol=1e-4, atol=1e-4)
    assert not rewards.requires_grad
    assert out.aux_loss is None


def test_a_completion_mask_stands_for_labels(models):
    pairs = preference_batch()
    masked = {k: v for k, v in pairs.items() if k != "labels"}
    masked["completion_mask"] = (pairs["labels"] != -100).long()
    a, b = hf.dpo_loss(models[0], pairs, models[1]), hf.dpo_loss(models[0], masked, models[1])
    assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


def test_a_precomputed_reference_is_the_reference(models):
    model, reference = models
    pairs = preference_batch()
    with torch.no_grad():
        ref = hf.sequence_logps(
            reference, pairs["input_ids"], pairs["labels"], pairs["attention_mask"]
        )
    precomputed = {**pairs, "ref_chosen_logps": ref[:3], "ref_rejected_logps": ref[3:]}
    a = hf.dpo_loss(model, pairs, reference, beta=BETA)
    b = hf.dpo_loss(model, precomputed, beta=BETA)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.chosen_rewards, b.chosen_rewards, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "FalconH1", "Mixtral"])
def test_a_model_against_itself_has_margin_zero_to_the_bit(family):
    model = build(family)
    out = hf.dpo_loss(model, preference_batch(), copy.deepcopy(model))
    assert torch.equal(out.chosen_rewards, torch.zeros(3))
    assert torch.equal(out.rejected_rewards, torch.zeros(3))
    assert out.loss.item() == torch.tensor(math.log(2.0)).item()


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_peft_model_is_its_own_reference(target_modules):
    model = lora(build("Llama"), target_modules=target_modules).train()
    pairs = preference_batch()
    out = hf.dpo_loss(model, pairs, beta=BETA)
    assert torch.equal(out.chosen_rewards, torch.zeros(3))
    assert torch.equal(out.rejected_rewards, torch.zeros(3))

    disturb(model)
    with torch.no_grad(), model.disable_adapter():
        ref = eager(model, pairs)
    expected = eager_sigmoid(eager(model, pairs), ref)
    expected.backward()
    expected_grads = gradients(model)
    out = hf.dpo_loss(model, pairs, beta=BETA)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    got = gradients(model)
    assert got
    assert all("lora" in name for name in got)
    assert_same_gradients(got, expected_grads)


def test_reference_free_and_objectives_with_options(models):
    model, reference = models
    pairs = preference_batch()
    policy = eager(model, pairs)
    lengths = (pairs["labels"][:, 1:] != -100).sum(-1)
    out = hf.dpo_loss(model, pairs, beta=BETA, reference_free=True)
    torch.testing.assert_close(
        out.loss, eager_sigmoid(policy, torch.zeros(6)), rtol=1e-5, atol=1e-5
    )

    out = hf.dpo_loss(model, pairs, beta=2.0, objective="simpo", gamma=0.7, reference_free=True)
    averages = policy / lengths
    expected = -F.logsigmoid(2.0 * (averages[:3] - averages[3:]) - 0.7).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)

    out = hf.dpo_loss(model, pairs, reference, beta=BETA, objective="ipo", average_log_prob=True)
    with torch.no_grad():
        ratios = (policy - eager(reference, pairs)) / lengths
    expected = (ratios[:3] - ratios[3:] - 0.5 / BETA).square().mean()
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-4, atol=1e-4)


def test_the_routers_loss_of_a_mixture_of_experts(models):
    model = build("Mixtral")
    pairs = preference_batch()
    plain = hf.dpo_loss(model, pairs, reference_free=True)
    assert plain.aux_loss is None
    out = hf.dpo_loss(model, pairs, reference_free=True, router_aux_loss_coef=0.5)
    expected = model(
        input_ids=pairs["input_ids"],
        attention_mask=pairs["attention_mask"],
        output_router_logits=True,
    ).aux_loss
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * expected)
    with pytest.raises((ValueError, TypeError)):
        hf.dpo_loss(models[0], pairs, reference_free=True, router_aux_loss_coef=0.5)


def test_statistics_of_the_tokens_come_with_the_loss(models):
    model, reference = models
    pairs = preference_batch()
    names = ("entropy", "mean_logits", "is_top1")
    plain = hf.dpo_loss(model, pairs, reference)
    out = hf.dpo_loss(model, pairs, reference, stats=names)
    expected = hf.sequence_logps(
        model,
        pairs["input_ids"],
        pairs["labels"],
        pairs["attention_mask"],
        per_token=True,
        stats=names,
    )
    assert plain.tokens is None
    assert torch.equal(plain.loss, out.loss)
    assert out.tokens.log_sum_sq_probs is None
    for name in ("logps", *names):
        got = getattr(out.tokens, name)
        assert not got.requires_grad
        torch.testing.assert_close(got, getattr(expected, name).detach())


def test_other_entries_of_the_batch_go_to_the_model(models):
    pairs = preference_batch()
    shifted = {**pairs, "position_ids": torch.arange(3, 14).expand(6, -1)}
    out = hf.dpo_loss(models[0], shifted, reference_free=True)
    expected = eager(models[0], shifted)
    torch.testing.assert_close(
        torch.cat([out.chosen_logps, out.rejected_logps]), expected, rtol=1e-5, atol=1e-4
    )


def test_bad_batches_are_named(models):
    model, reference = models
    good = preference_batch()

    def without(*keys):
        return {k: v for k, v in good.items() if k not in keys}

    three = torch.zeros(3)
    for pairs, options, message in (
        (without("input_ids"), {}, "input_ids"),
        (without("labels"), {}, "labels"),
        ({**good, "completion_mask": good["labels"]}, {}, "completion_mask"),
        ({k: v[:5] for k, v in good.items()}, {}, "whole pairs"),
        ({**good, "labels": good["labels"][:, 1:]}, {}, "labels"),
        ({**without("labels"), "completion_mask": good["labels"][:1]}, {}, "completion_mask"),
        ({**good, "ref_chosen_logps": three}, {"ref_model": None}, "ref_rejected_logps"),
        (
            {**good, "ref_chosen_logps": three, "ref_rejected_logps": torch.zeros(4)},
            {"ref_model": None},
            "ref_rejected_logps",
        ),
        ({**good, "ref_chosen_logps": three, "ref_rejected_logps": three}, {}, "ref_model"),
        (good, {"ref_model": None}, "ref_model"),
        (good, {"reference_free": True}, "reference_free"),
        (good, {"objective": "nonsense"}, "objective"),
        (good, {"beta": -1.0}, "beta"),
        (good, {"label_smoothing": 0.7}, "label_smoothing"),
        (good, {"gamma": 1.0}, "gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.dpo_loss(model, pairs, **{"ref_model": reference, **options})


@pytest.mark.parametrize("padding", ["right", "left"])
def test_rows_that_a_collator_found(models, padding):
    model, reference = models
    pairs = preference_batch(padding)
    found = hf.with_row_index(pairs)
    labels = pairs["labels"]
    assert len(found["row_index"]) == (labels[:, 1:] != -100).sum()
    mask = {**pairs, "completion_mask": (labels != -100).long()}
    del mask["labels"]
    assert torch.equal(hf.with_row_index(mask)["row_index"], found["row_index"])
    outputs = []
    for given in (pairs, found):
        out = hf.dpo_loss(model, given, reference, beta=BETA)
        out.loss.backward()
        outputs.append((out.loss.detach(), *gradients(model).values()))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="input_ids"):
        hf.with_row_index({"labels": labels})
    for wrong, message in (
        ({"row_index": found["row_index"].int()}, "row_index"),
        ({"row_index": found["row_index"].flip(0)}, "row_index"),
        ({"row_index": torch.tensor([labels.numel() - 1])}, "labels"),  # predicts nothing
        ({"row_index": found["row_index"][:4]}, "row_index should name every"),  # cut as a batch is
    ):
        with pytest.raises(ValueError, match=message):
            hf.dpo_loss(model, {**pairs, **wrong}, reference)


def test_training_steps_lower_the_loss(models):
    model, reference = models
    pairs = preference_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        out = hf.dpo_loss(model, pairs, reference, beta=BETA)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (out.chosen_rewards > out.rejected_rewards).all()


@pytest.mark.parametrize(
    "name", ["pairs", "ignore_index", "ref_hidden", "cu_seqlens", "row_index", "weight", "softcap"]
)
def test_what_model_and_batch_determine_is_refused(name):
    model, (input_ids, _, labels) = build("Llama"), batch()
    pairs = {"input_ids": input_ids, "labels": labels}
    with pytest.raises(ValueError, match=f"^{name} should not be given"):
        hf.dpo_loss(model, pairs, reference_free=True, **{name: None})


@pytest.mark.parametrize("key", ["reference_chosen_logps", "ref_choosen_logps", "logps"])
def test_a_misspelt_reference_is_refused(key):
    model, (input_ids, _, labels) = build("Llama"), batch()
    pairs = {"input_ids": input_ids, "labels": labels, key: torch.zeros(2)}
    with pytest.raises(ValueError, match=f"batch should have its reference under .*{key}"):
        hf.dpo_loss(model, pairs, model)
