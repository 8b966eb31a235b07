"""How long a probe's verdict holds: whatever a model's forward looks at before it returns its
logits, a change of it asks for a new one, and turns that come back do not."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_models import FAMILIES, batch, build, eager_token_logps
from test_hf_capture import CLOSE, disturb, lora
from torch import nn

from fastdpo.integrations import hf, probe


class MoodyForCausalLM(transformers.LlamaForCausalLM):
    """Doubles its logits under some condition."""

    doubles = staticmethod(lambda model, logits, kwargs: False)

    def forward(self, *args, loud=False, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if self.doubles(self, outputs.logits, {"loud": loud}):
            outputs.logits = 2 * outputs.logits
        return outputs


def moody(doubles):
    torch.manual_seed(0)
    model = MoodyForCausalLM(transformers.LlamaConfig(**FAMILIES["Llama"])).eval()
    model.doubles = doubles
    return model


@pytest.fixture
def probes(monkeypatch):
    """The verdicts asked for, as they come."""
    asked, verify = [], probe.verify

    def counted(*args):
        asked.append(args)
        verify(*args)

    monkeypatch.setattr(probe, "verify", counted)
    return asked


def _replace_weight(model):
    weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weight.marked = True
    model.lm_head.weight = weight


def _marked(forward):
    def marked(*args, **kwargs):
        return forward(*args, **kwargs)

    marked.marked = True
    return marked


def _own_parameter(model):
    with torch.no_grad():
        model.extra_scale.mul_(2.0)


def _with_own_parameter():
    model = moody(lambda model, logits, kwargs: bool(model.extra_scale != 1.0))
    model.extra_scale = nn.Parameter(torch.ones(()))
    return model


# What the model looks at, and how it comes about that it doubles its logits.
CHANGES = {
    "its mode": (lambda: moody(lambda m, z, k: m.training), lambda m: m.train()),
    "its head's mode": (
        lambda: moody(lambda m, z, k: m.get_output_embeddings().training),
        lambda m: m.lm_head.train(),
    ),
    "the mode of a module beside the head": (
        lambda: moody(lambda m, z, k: m.model.training),
        lambda m: setattr(m.model, "training", True),
    ),
    "its dtype": (
        lambda: moody(lambda m, z, k: z.dtype == torch.bfloat16),
        lambda m: m.bfloat16(),
    ),
    "a number of its configuration": (
        lambda: moody(lambda m, z, k: m.config.pretraining_tp == 2),
        lambda m: setattr(m.config, "pretraining_tp", 2),
    ),
    "a number of its own": (
        lambda: moody(lambda m, z, k: getattr(m, "extra", 1.0) != 1.0),
        lambda m: setattr(m, "extra", 2.0),
    ),
    "a parameter of its own": (_with_own_parameter, _own_parameter),
    "which parameter its head has": (
        lambda: moody(lambda m, z, k: hasattr(m.get_output_embeddings().weight, "marked")),
        _replace_weight,
    ),
    "a forward put over its own": (
        lambda: moody(lambda m, z, k: hasattr(m.forward, "marked")),
        lambda m: setattr(m, "forward", _marked(m.forward)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("changed_first", [False, True])
def test_a_change_that_the_logits_follow_is_noticed(change, changed_first, probes):
    make, apply = CHANGES[change]
    model, (input_ids, mask, labels) = make(), batch()
    if not changed_first:
        expected = eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)
        for _ in range(2):
            got = hf.sequence_logps(model, input_ids, labels, mask)
            torch.testing.assert_close(got, expected, **CLOSE)
        assert len(probes) == 1
    apply(model)
    with pytest.raises(hf.UnsupportedModel, match="MoodyForCausalLM does something"):
        hf.sequence_logps(model, input_ids, labels, mask)


CIRCUMSTANCES = {
    "gradients": (lambda m, z, k: not torch.is_grad_enabled(), torch.no_grad, {}),
    "autocast": (
        lambda m, z, k: torch.is_autocast_enabled("cpu"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        {},
    ),
    "an argument": (lambda m, z, k: k["loud"], torch.enable_grad, {"loud": True}),
}


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_circumstances_of_the_call(circumstance):
    doubles, within, options = CIRCUMSTANCES[circumstance]
    model, (input_ids, mask, labels) = moody(doubles), batch()
    before = hf.sequence_logps(model, input_ids, labels, mask)
    for _ in range(2):
        with within(), pytest.raises(hf.UnsupportedModel, match="does something"):
            hf.sequence_logps(model, input_ids, labels, mask, **options)
        assert torch.equal(hf.sequence_logps(model, input_ids, labels, mask), before)


def test_turns_are_probed_once_each_and_optimizer_steps_never(probes):
    model, (input_ids, mask, labels) = build("Llama"), batch()
    pairs = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    reference = build("Llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model.train()
        hf.dpo_loss(model, pairs, reference).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            hf.dpo_loss(model, pairs, reference)
    assert len(probes) == 3  # the policy in two modes, the reference in one


def test_adapters_that_are_switched_off_are_another_head(probes):
    def doubles(model, logits, kwargs):
        return model.get_output_embeddings().disable_adapters

    model = lora(moody(doubles), target_modules=["lm_head"])
    disturb(model)
    input_ids, mask, labels = batch()
    for _ in range(2):
        hf.sequence_logps(model, input_ids, labels, mask)
        with model.disable_adapter(), pytest.raises(hf.UnsupportedModel, match="does something"):
            hf.sequence_logps(model, input_ids, labels, mask)
    model.merge_adapter()
    hf.sequence_logps(model, input_ids, labels, mask)
    assert len(probes) == 4  # the adapted head, twice the bare one, the merged one


def test_a_head_is_probed_in_the_mode_that_it_has():
    """Its adapter's dropout is switched off for the probe, and nothing but that."""
    model = lora(build("Llama"), target_modules=["lm_head"], lora_dropout=0.5)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output * (2 if module.training else 1))
    input_ids, mask, labels = batch()
    hf.sequence_logps(model.eval(), input_ids, labels, mask)
    with pytest.raises(hf.UnsupportedModel, match="differ"):
        hf.sequence_logps(model.train(), input_ids, labels, mask)
    assert all(module.training for module in model.modules())


def test_verdicts_are_bounded_and_lengths_ask_for_none(probes):
    model, (input_ids, mask, labels) = moody(lambda *_: False), batch()
    for i in range(40):
        hf.sequence_logps(model, input_ids, labels, mask, loud=f"value {i}")
    assert len(probes) == 40
    assert len(probe._verified[model.lm_head]) == probe._SUBJECTS
    for i in range(3):  # an integer, as flash attention's max_length_q
        hf.sequence_logps(model, input_ids, labels, mask, loud=i)
    assert len(probes) == 41


def test_modes_that_take_turns_under_torch_compile(probes):
    """No probe is compiled, and each mode once."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = build("Llama"), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    input_ids, mask, labels = batch()
    expected = eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)
    frames = []
    for _ in range(3):
        got = hf.sequence_logps(compiled.train(), input_ids, labels, mask)
        torch.testing.assert_close(got, expected, **CLOSE)
        with torch.no_grad():
            got = hf.sequence_logps(compiled.eval(), input_ids, labels, mask)
        torch.testing.assert_close(got, expected, **CLOSE)
        frames.append(counter.frame_count)
    assert frames == [0, 2, 2]
    assert len(probes) == 2
