"""`dpo_loss` for objectives that are not about pairs: single answers and rankings."""

from __future__ import annotations

import pytest
import torch
from hf_models import assert_same_gradients, batch, build, eager_token_logps, gradients
from test_hf_capture import disturb, lora

from fastdpo.integrations import hf
from fastdpo.loss import linear_dpo_loss

BETA = 0.2


def answers(sequences):
    input_ids, attention_mask, labels = batch(sequences=sequences)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def eager(model, given):
    ids, labels, mask = given["input_ids"], given["labels"], given["attention_mask"]
    return eager_token_logps(model, ids, labels, attention_mask=mask).sum(-1)


def desirable(sequences):
    return torch.arange(sequences) % 3 != 1


def kto(ratios, good, kl=0.0):
    sign = torch.where(good, 1.0, -1.0)
    return torch.sigmoid(-sign * (BETA * (ratios - kl))).mean()


def bco(ratios, good, delta):
    sign = torch.where(good, 1.0, -1.0)
    return -torch.nn.functional.logsigmoid(sign * (BETA * ratios - delta)).mean()


def plackett_luce(ratios, ranks):
    scores = BETA * ratios.view(ranks, -1)
    return -sum((scores[k] - scores[k:].logsumexp(0)) for k in range(ranks)).mean()


THREE = {"num_candidates": 3}
CASES = {
    "kto of one": (1, "kto", {"kl": 0.0}, lambda r: kto(r, desirable(1))),
    "kto of three": (3, "kto", {"kl": 0.5}, lambda r: kto(r, desirable(3), 0.5)),
    "kto of four": (4, "kto", {"kl": 0.0}, lambda r: kto(r, desirable(4))),
    "bco of five": (5, "bco", {"delta": 0.3}, lambda r: bco(r, desirable(5), 0.3)),
    "three ranks": (3, "plackett_luce", THREE, lambda r: plackett_luce(r, 3)),
    "three ranks, two prompts": (6, "plackett_luce", THREE, lambda r: plackett_luce(r, 3)),
    "two ranks": (4, "plackett_luce", {"num_candidates": 2}, lambda r: plackett_luce(r, 2)),
}


def options_of(case):
    sequences, objective, options, expected = CASES[case]
    options = {"objective": objective, "beta": BETA, **options}
    if objective != "plackett_luce":
        options["desirable"] = desirable(sequences)
    return sequences, options, expected


@pytest.fixture
def models():
    model, reference = build("Gemma2"), build("Gemma2")
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.002 * torch.randn_like(p))
    return model, reference


@pytest.mark.parametrize("case", CASES)
def test_loss_outputs_and_gradients(models, case):
    (model, reference), (sequences, options, expected_of) = models, options_of(case)
    given = answers(sequences)
    with torch.no_grad():
        ref = eager(reference, given)
    policy = eager(model, given)
    expected = expected_of(policy - ref)
    expected.backward()
    expected_grads = gradients(model)

    out = hf.dpo_loss(model, given, reference, stats=("entropy",), **options)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model), expected_grads)
    if "desirable" in options:
        first = options["desirable"]
    else:
        first = torch.arange(sequences) < sequences // options["num_candidates"]
    rewards = BETA * (policy - ref).detach()
    for got, want in (
        (out.chosen_logps, policy[first]),
        (out.rejected_logps, policy[~first]),
        (out.chosen_rewards, rewards[first]),
        (out.rejected_rewards, rewards[~first]),
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert out.tokens.logps.shape == given["labels"].shape

    # And linear_dpo_loss says the same about the same hidden states.
    with torch.no_grad():
        head = hf.read_head(model)
        hidden = model.model(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).last_hidden_state
        labels = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
        linear = linear_dpo_loss(
            hidden, head.weight, labels, ref_logps=ref, softcap=head.softcap, **options
        )
    torch.testing.assert_close(out.loss.detach(), linear.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_precomputed_references_and_rows(models, case):
    (model, reference), (sequences, options, _) = models, options_of(case)
    given = answers(sequences)
    with torch.no_grad():
        ref = eager(reference, given)
    expected = hf.dpo_loss(model, given, reference, **options)
    for extra in ({}, {"row_index": hf.with_row_index(given)["row_index"]}):
        got = hf.dpo_loss(model, {**given, "ref_logps": ref, **extra}, **options)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.chosen_rewards, expected.chosen_rewards, atol=1e-4, rtol=0)
    rows = hf.dpo_loss(model, hf.with_row_index(given), reference, **options)
    assert torch.equal(rows.loss, expected.loss)


@pytest.mark.parametrize("case", ["kto of one", "three ranks"])
def test_an_adapter_and_its_base(case):
    sequences, options, expected_of = options_of(case)
    model, given = lora(build("Llama")), answers(sequences)
    disturb(model)
    with torch.no_grad(), model.disable_adapter():
        ref = eager(model, given)
    expected = expected_of(eager(model, given) - ref)
    torch.testing.assert_close(hf.dpo_loss(model, given, **options).loss, expected)


def test_a_collator_knows_no_objective():
    """It may make rows of any number of sequences."""
    for sequences in (1, 2, 3):
        given = answers(sequences)
        rows = hf.with_row_index(given)["row_index"]
        assert len(rows) == (given["labels"][:, 1:] != -100).sum()


REFUSALS = [
    ("kto of three", {"ref_chosen_logps": torch.zeros(3)}, "['ref_logps'], got 'ref_chosen_logps'"),
    ("three ranks", {"ref_rejected_logps": torch.zeros(3)}, "['ref_logps'], got 'ref_rejected"),
    ("kto of three", {"ref_KL_logps": torch.zeros(3)}, "['ref_logps'], got 'ref_KL_logps'"),
    ("kto of three", {"ref_logps": torch.zeros(2)}, "batch['ref_logps'] should have shape (3,)"),
    ("kto of three", {"ref_logps": torch.zeros(3)}, "ref_model should be None where the batch has"),
]


@pytest.mark.parametrize(("case", "extra", "message"), REFUSALS)
def test_the_wrong_reference_is_named(models, case, extra, message):
    sequences, options, _ = options_of(case)
    with pytest.raises(ValueError) as raised:
        hf.dpo_loss(models[0], {**answers(sequences), **extra}, models[1], **options)
    assert message in str(raised.value)


KTO = {"objective": "kto", "kl": 0.0}
MISFITS = {
    "pairs": (3, {}, "batch['input_ids'] should be of a number of sequences that makes whole pai"),
    "ranks": (4, {"objective": "plackett_luce", **THREE}, "whole groups of 3, got 4 sequences"),
    "flags": (3, {**KTO, "desirable": desirable(2)}, "desirable should have 3 entries"),
    "no flags": (3, KTO, "kto needs the option desirable"),
    "no free reference": (
        3,
        {**KTO, "desirable": desirable(3), "ref_model": None, "reference_free": True},
        "should be given for kto",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_before_a_model_runs(models, misfit):
    model, reference = models
    sequences, options, message = MISFITS[misfit]
    for lm in models:
        lm.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError) as raised:
        hf.dpo_loss(model, answers(sequences), **{"ref_model": reference, **options})
    assert message in str(raised.value)


def test_a_reference_that_is_missing_is_named_as_the_layout_has_it(models):
    for sequences, options, name in (
        (3, {**KTO, "desirable": desirable(3)}, "ref_logps"),
        (4, {}, "ref_chosen_logps and ref_rejected_logps"),
    ):
        with pytest.raises(ValueError, match=rf"the batch has no {name} \(or"):
            hf.dpo_loss(models[0], answers(sequences), **options)


def test_pairs_have_two_columns_of_references(models):
    given = {**answers(4), "ref_logps": torch.zeros(4)}
    expected = r"\['ref_chosen_logps', 'ref_rejected_logps'\], got 'ref_logps'"
    with pytest.raises(ValueError, match=expected):
        hf.dpo_loss(models[0], given, models[1])
