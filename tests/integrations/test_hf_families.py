"""Every family's log-probabilities and gradients against its own logits."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from hf_models import (
    FAMILIES,
    assert_same_gradients,
    batch,
    build,
    eager_token_logps,
    gradients,
)
from torch import nn

from fastdpo.backends.torch import logits_of
from fastdpo.integrations import families, hf, probe
from fastdpo.integrations.subject import subject_of


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_all_gradients_match_the_models_own_logits(family, padding):
    model = build(family)
    input_ids, attention_mask, labels = batch(padding=padding)
    upstream = torch.linspace(-1.0, 2.0, len(labels))  # every sequence its own weight, one negative

    kwargs = {"attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:  # as generation makes them
        kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    expected = eager_token_logps(model, input_ids, labels, **kwargs).sum(-1)
    (expected * upstream).sum().backward()
    expected_grads = gradients(model)
    got = hf.sequence_logps(model, input_ids, labels, attention_mask)
    (got * upstream).sum().backward()

    assert got.shape == (4,)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients(model), expected_grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_read_head_maps_the_heads_input_to_the_models_logits(family):
    model = build(family)
    input_ids, _, _ = batch()
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
    handle.remove()
    ours = logits_of(seen[0].detach(), hf.read_head(model))
    torch.testing.assert_close(ours.detach(), logits, rtol=1e-5, atol=1e-4)


def test_hidden_scale_takes_the_backbones_output_to_the_head():
    model = build("MiniCPM3")
    input_ids, _, _ = batch()
    assert hf.hidden_scale(model) == 0.5
    with torch.no_grad():
        hidden = model.model(input_ids=input_ids).last_hidden_state * hf.hidden_scale(model)
        torch.testing.assert_close(
            logits_of(hidden, hf.read_head(model)), model(input_ids=input_ids).logits
        )
    assert hf.hidden_scale(build("Llama")) == 1.0


def test_every_entry_of_the_table_names_a_class_of_transformers():
    unknown = [name for name in families.FAMILIES if not hasattr(transformers, name)]
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        assert unknown == []
    # Older versions lack the newest families, never the ones that the tests build.
    assert {"Gemma2ForCausalLM", "CohereForCausalLM", "GraniteForCausalLM"}.isdisjoint(unknown)


class _Unknown(transformers.LlamaForCausalLM):
    """A family that nobody has told fastdpo about."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.alter(outputs.logits)
        return outputs

    def alter(self, logits):
        return logits


def _unknown(alter, initializer_range=0.4, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**FAMILIES["Llama"], "initializer_range": initializer_range}
    )
    cls = type("InventedForCausalLM", (_Unknown,), {"alter": staticmethod(alter)})
    return cls(config).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_unknown_family_with_plain_logits_is_found_to_be_plain(dtype):
    model = _unknown(lambda logits: logits, dtype=dtype)
    input_ids, attention_mask, labels = batch()
    with torch.no_grad():
        got = hf.sequence_logps(model, input_ids, labels, attention_mask)
        expected = eager_token_logps(model, input_ids, labels, attention_mask=attention_mask).sum(
            -1
        )
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    )
    torch.testing.assert_close(got, expected, **tolerance)


ALTERATIONS = {
    "scaled": lambda z: z * 1.1,
    "capped": lambda z: 30.0 * torch.tanh(z / 30.0),
    "cut": lambda z: z[..., :-1],
    "shifted entry": lambda z: z + torch.nn.functional.one_hot(torch.tensor(7), z.shape[-1]),
    "normalised": lambda z: z / z.norm(dim=-1, keepdim=True),
    "clamped": lambda z: z.clamp(max=50.0),
    "taken out": lambda z: z.index_fill(-1, torch.tensor([7]), -torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_unknown_family_that_alters_its_logits_is_refused(alteration, dtype):
    # Fresh weights of the usual size: the logits are so small that a softcap hides in them.
    model = _unknown(ALTERATIONS[alteration], initializer_range=0.02, dtype=dtype)
    input_ids, attention_mask, labels = batch()
    for _ in range(2):  # the refusal is not forgotten on the second call
        with pytest.raises(hf.UnsupportedModel, match=r"InventedForCausalLM.*FAMILIES"):
            hf.sequence_logps(model, input_ids, labels, attention_mask)


def test_an_unknown_family_can_be_described(monkeypatch):
    model = _unknown(lambda logits: logits * 0.5)
    rule = hf.HeadRule(scale=0.5)
    monkeypatch.setitem(families.FAMILIES, "InventedForCausalLM", lambda model: rule)
    input_ids, attention_mask, labels = batch()
    got = hf.sequence_logps(model, input_ids, labels, attention_mask)
    expected = eager_token_logps(model, input_ids, labels, attention_mask=attention_mask).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_a_known_family_whose_entry_is_out_of_date_is_refused(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "Gemma2ForCausalLM", lambda model: families.PLAIN)
    input_ids, _, labels = batch()
    with pytest.raises(hf.UnsupportedModel, match="Gemma2ForCausalLM"):
        hf.sequence_logps(build("Gemma2"), input_ids, labels)


def test_the_verdict_is_kept_per_model_and_does_not_keep_the_model():
    import gc
    import weakref

    model = build("Llama")
    input_ids, _, labels = batch()
    head = model.get_output_embeddings()

    def verified(model, rule=families.PLAIN):
        head, given = model.lm_head, {"input_ids": input_ids, "use_cache": False}
        return probe.is_verified(head, subject_of(model, head, rule, "cpu", given, False))

    assert not verified(model)
    hf.sequence_logps(model, input_ids, labels)
    assert verified(model)
    assert not verified(model, hf.HeadRule(scale=2.0))
    gone = weakref.ref(head)
    del model, head
    gc.collect()
    assert gone() is None


def test_the_table_reads_a_configuration_that_changes():
    model = build("Granite")
    input_ids, _, labels = batch()
    hf.sequence_logps(model, input_ids, labels)
    model.config.logits_scaling = 5.0
    got = hf.sequence_logps(model, input_ids, labels)
    torch.testing.assert_close(
        got, eager_token_logps(model, input_ids, labels).sum(-1), rtol=1e-5, atol=1e-4
    )
