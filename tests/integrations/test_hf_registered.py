"""Heads of classes that somebody registered, and Baichuan's NormHead among them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hf_models import assert_same_gradients, batch, build, eager_token_logps, gradients
from test_hf_capture import CLOSE, disturb, lora
from torch import nn

from fastdpo.integrations import hf, registered
from fastdpo.integrations.hf import HeadParts, register_head


class NormHead(nn.Module):
    """A stand-in, written as Baichuan 2's modeling_baichuan.py has it."""

    def __init__(self, hidden_size, vocab_size, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty((vocab_size, hidden_size)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.first_flag = True

    def forward(self, hidden_states):
        if self.training:
            norm_weight = F.normalize(self.weight)
            self.first_flag = True
        elif self.first_flag:
            self.first_flag = False
            self.weight = nn.Parameter(F.normalize(self.weight))
            norm_weight = self.weight
        else:
            norm_weight = self.weight
        return F.linear(hidden_states, norm_weight)


class CosineHead(nn.Linear):
    def forward(self, x):
        return 3.0 * (F.linear(x, F.normalize(self.weight)) + self.bias)


class CappedHead(nn.Linear):
    def forward(self, x):
        return 2.0 * torch.tanh(super().forward(x) / 2.0)


class TransposedHead(nn.Module):
    """Whose parameters tell nobody how large the vocabulary is."""

    def __init__(self, size, vocab):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(size, vocab))

    def forward(self, x):
        return x @ self.kernel


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registered, "_REGISTERED", dict(registered._REGISTERED))


def with_head(head, family="Llama", **options):
    model = build(family, **options)
    torch.manual_seed(1)
    size, vocab = model.config.hidden_size, model.config.vocab_size
    made = head(size, vocab)
    if getattr(made, "bias", None) is not None:
        nn.init.normal_(made.bias)
    model.lm_head = made
    return model.eval()


def logps(model):
    input_ids, mask, labels = batch()
    return eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)


def ours(model):
    input_ids, mask, labels = batch()
    return hf.sequence_logps(model, input_ids, labels, mask)


def compare(model):
    """With a probe and without, and the model's own values and gradients on a copy of it: eval mode
    may write over a weight."""
    expected = logps(twin := copy.deepcopy(model))
    expected.sum().backward()
    expected_grads = gradients(twin)
    for _ in range(2):
        got = ours(model)
        got.sum().backward()
        torch.testing.assert_close(got, expected, **CLOSE)
        assert_same_gradients(gradients(model), expected_grads)


@pytest.mark.parametrize("family", ["Llama", "Granite", "Gemma2"])
def test_norm_head_in_training(family):
    options = {"tie_word_embeddings": False} if family == "Gemma2" else {}
    model = with_head(NormHead, family, **options).train()
    compare(model)
    assert model.lm_head.first_flag


def test_norm_head_in_turns():
    """Its eval mode normalises the weight for good; what is trained goes on from there."""
    model = with_head(NormHead).train()
    twin = copy.deepcopy(model)
    for training in (True, False, False, True, False, True):
        for one in (model, twin):
            one.train(training)
        got, expected = ours(model), logps(twin)
        torch.testing.assert_close(got, expected, **CLOSE)
        for one, value in ((model, got), (twin, expected)):
            value.sum().backward()
            with torch.no_grad():
                for p in one.lm_head.parameters():  # in eval mode not what it was
                    p -= 1e-2 * p.grad / p.grad.norm()
            one.zero_grad()
        assert model.lm_head.first_flag == twin.lm_head.first_flag
        torch.testing.assert_close(model.lm_head.weight, twin.lm_head.weight, **CLOSE)


def test_a_norm_head_as_its_own_reference_is_not_written_over():
    model = lora(with_head(NormHead)).train()
    weight = model.get_output_embeddings().weight
    before = weight.detach().clone()
    input_ids, mask, labels = batch(sequences=6)
    pairs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    out = hf.dpo_loss(model, pairs)
    assert out.loss.item() == torch.tensor(math.log(2.0)).item()
    assert model.get_output_embeddings().weight is weight
    assert torch.equal(weight, before)
    assert all(m.training for m in model.modules())


def test_norm_head_under_a_copy_that_is_trained():
    model = lora(with_head(NormHead), modules_to_save=["lm_head"]).train()
    disturb(model)
    compare(model)


def test_norm_head_compiles():
    torch._dynamo.reset()
    model = with_head(NormHead).train()
    expected = logps(model)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for _ in range(3):
        torch.testing.assert_close(ours(compiled), expected, **CLOSE)


def test_read_head_of_a_norm_head():
    model = with_head(NormHead)
    head = hf.read_head(model)  # in eval mode, and not called yet
    torch.testing.assert_close(head.weight, F.normalize(model.lm_head.weight))
    logps(model)
    assert hf.read_head(model).weight is model.lm_head.weight


HEADS = {
    "a scale and a bias": (
        CosineHead,
        lambda head: HeadParts(F.normalize(head.weight), head.bias, scale=3.0),
        {},
    ),
    "a scale in a family that has one": (
        CosineHead,
        lambda head: HeadParts(F.normalize(head.weight), head.bias, scale=3.0),
        {"family": "Granite"},
    ),
    "a softcap": (
        CappedHead,
        lambda head: HeadParts(head.weight, head.bias, softcap=2.0),
        {},
    ),
    "a softcap in a family that scales": (
        CappedHead,
        lambda head: HeadParts(head.weight, head.bias, softcap=2.0),
        {"family": "Granite"},
    ),
    "a transposed weight": (TransposedHead, lambda head: HeadParts(head.kernel.t()), {}),
}


@pytest.mark.parametrize("case", HEADS)
def test_registered_heads(case, registry):
    kind, describe, options = HEADS[case]
    model = with_head(kind, **options)
    with pytest.raises(hf.UnsupportedModel, match=rf"register_head\({kind.__name__}"):
        ours(model)
    register_head(kind, describe)
    compare(model)
    compare(model.train())
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = logps(model), ours(model)
    exact = logps(model.double())
    assert (got - exact).norm() <= 1.5 * (expected - exact).norm() + 1e-3


def test_a_name_and_subclasses(registry):
    class Sub(CosineHead):
        pass

    class Other(CosineHead):
        def forward(self, x):
            return 2.0 * super().forward(x)

    register_head("CosineHead", HEADS["a scale and a bias"][1])
    compare(with_head(Sub))
    with pytest.raises(hf.UnsupportedModel, match="is a Other, whose arithmetic"):
        ours(with_head(Other))
    register_head(Other, lambda head: HeadParts(F.normalize(head.weight), head.bias, scale=6.0))
    compare(with_head(Other))


def test_a_description_that_is_wrong_is_found(registry):
    register_head(CosineHead, lambda head: HeadParts(head.weight, head.bias, scale=3.0))
    with pytest.raises(hf.UnsupportedModel, match="does something to its logits"):
        ours(with_head(CosineHead))
    # In one of its modes as well: each is asked for.
    register_head(
        CappedHead, lambda head: HeadParts(head.weight, head.bias, softcap=4.0 - 2 * head.training)
    )
    model = with_head(CappedHead)
    ours(model.train())
    with pytest.raises(hf.UnsupportedModel, match="does something to its logits"):
        ours(model.eval())


def test_a_flag_of_the_heads_own_asks_for_a_new_probe(registry):
    class Flagged(nn.Linear):
        twice = False

        def forward(self, x):
            return super().forward(x) * (2.0 if self.twice else 1.0)

    register_head(Flagged, lambda head: HeadParts(head.weight, head.bias))
    model = with_head(Flagged)
    ours(model)
    model.lm_head.twice = True
    with pytest.raises(hf.UnsupportedModel, match="does something to its logits"):
        ours(model)


class UnitHead(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight), self.bias)


def test_lora_on_a_registered_head(registry):
    register_head(UnitHead, lambda head: HeadParts(F.normalize(head.weight), head.bias))
    model = lora(with_head(UnitHead), target_modules=["lm_head"])
    disturb(model)
    compare(model)

    register_head(CosineHead, HEADS["a scale and a bias"][1])
    model = lora(with_head(CosineHead), target_modules=["lm_head"])
    with pytest.raises(hf.UnsupportedModel, match="registered CosineHead with a scale"):
        ours(model)
    model = lora(with_head(UnitHead), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(hf.UnsupportedModel, match="DoRA adapter on a registered UnitHead"):
        ours(model)
    options = {"trainable_token_indices": {"lm_head": [3, 4]}}
    with pytest.raises(hf.UnsupportedModel, match="trainable_token_indices on a UnitHead"):
        ours(lora(with_head(UnitHead), **options))


def test_two_softcaps_are_refused(registry):
    register_head(CappedHead, lambda head: HeadParts(head.weight, head.bias, softcap=2.0))
    model = with_head(CappedHead, "Gemma2", tie_word_embeddings=False)
    with pytest.raises(hf.UnsupportedModel, match="a CappedHead, caps the logits, and so does"):
        ours(model)


def describe(head):
    return HeadParts(head.weight)


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        ("NormHead", describe, "kind should be registered once, got NormHead"),
        (nn.Linear, describe, "kind should be a class with a forward of its own, got Linear"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear, describe, "forward of its own"),
        (int, describe, "kind should be a class of torch.nn.Module or the name of one"),
        (nn.Linear(2, 2), describe, "kind should be a class of torch.nn.Module"),
        ("no name", describe, "kind should be a class of torch.nn.Module or the name of one"),
        (CosineHead, None, "describe should be a function .* got NoneType"),
        (CosineHead, HeadParts(torch.ones(1, 1)), "describe should be a function .* got HeadParts"),
    ],
)
def test_bad_registrations(kind, function, message, registry):
    before = dict(registered._REGISTERED)
    with pytest.raises(ValueError, match=message):
        register_head(kind, function)
    assert before == registered._REGISTERED


def test_a_class_is_registered_once(registry):
    register_head(CosineHead, describe)
    with pytest.raises(ValueError, match="registered once, got CosineHead"):
        register_head(CosineHead, describe)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda head: head.weight, "should be HeadParts, got Parameter"),
        (lambda head: HeadParts(head.bias), r"should have a weight \[V, D\], got shape \[53\]"),
        (lambda head: HeadParts(None), r"should have a weight \[V, D\], got NoneType"),
        (
            lambda head: HeadParts(head.weight.int()),
            r"should have a weight \[V, D\], got .* torch.int32",
        ),
        (lambda head: HeadParts(head.weight, head.weight), r"should have a bias of shape \[53\]"),
        (lambda head: HeadParts(head.weight, scale=0.0), "should have a scale that is not 0"),
        (lambda head: HeadParts(head.weight, scale=None), "should have a scale .* got None"),
        (lambda head: HeadParts(head.weight, softcap=-1.0), "should have a positive softcap"),
        (lambda head: HeadParts(head.weight, softcap=math.inf), "should have a positive softcap"),
    ],
)
def test_bad_descriptions(parts, message, registry):
    register_head(CosineHead, parts)
    model = with_head(CosineHead)
    with pytest.raises(hf.UnsupportedModel, match=f"a CosineHead, {message}"):
        ours(model)
