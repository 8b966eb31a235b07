"""The reference of a model that is its own: no dropout, another adapter, and no trace of either."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hf_models import batch, build, gradients
from test_hf_capture import disturb, lora

from fastdpo.integrations import hf
from fastdpo.integrations.reference import with_adapter, without_dropout

LN2 = torch.tensor(math.log(2.0)).item()


def pairs(**extra):
    input_ids, attention_mask, labels = batch(sequences=6)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **extra}


def reference_of(out, beta=0.1):
    """What the rewards say that the reference was."""
    logps = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
    return logps - torch.cat([out.chosen_rewards, out.rejected_rewards]) / beta


def continued(base=None, names=("default", "ref"), **options):
    """A model whose first adapter is trained, and the others copies of it."""
    model = lora(base or build("Llama"), **options)
    disturb(model)
    for name in names[1:]:
        model.add_adapter(name, model.peft_config["default"])
        state = dict(model.named_parameters())
        with torch.no_grad():
            for path, p in state.items():
                if ".default." in path:
                    state[path.replace(".default.", f".{name}.")].copy_(p)
    return model


def everything(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        model.active_adapters,
        [getattr(m, "_active_adapter", None) for m in model.modules()],
        [getattr(m, "_disable_adapters", None) for m in model.modules()],
    )


DROPOUTS = {
    "GPT2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "Llama": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("family", DROPOUTS)
def test_the_reference_has_no_dropout(family):
    rates = (
        {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}
        if family == "GPT2"
        else {"attention_dropout": 0.3}  # a function, and no module, drops there
    )
    model = lora(build(family, **rates), lora_dropout=0.3, **DROPOUTS[family])
    disturb(model)
    data = pairs()
    with torch.no_grad(), model.disable_adapter():
        expected = hf.sequence_logps(
            model.eval(), data["input_ids"], data["labels"], data["attention_mask"]
        )
    model.train()
    before = everything(model)
    outs = [hf.dpo_loss(model, data) for _ in range(2)]
    for out in outs:
        torch.testing.assert_close(reference_of(out), expected, rtol=1e-4, atol=1e-3)
    assert not torch.equal(outs[0].chosen_logps, outs[1].chosen_logps)  # the policy keeps its own
    assert everything(model) == before


def test_a_second_model_has_no_dropout_either():
    model, reference = build("GPT2", attn_pdrop=0.3), build("GPT2", attn_pdrop=0.3)
    data = pairs()
    expected = reference_of(hf.dpo_loss(model, data, reference))
    reference.train()
    reference.transformer.h[0].eval()
    modes = [m.training for m in reference.modules()]
    torch.testing.assert_close(reference_of(hf.dpo_loss(model, data, reference)), expected)
    assert [m.training for m in reference.modules()] == modes
    assert not model.training


def test_modes_and_flags_come_back_after_an_error():
    model = continued().train()
    model.base_model.model.model.layers[0].eval()
    next(p for path, p in model.named_parameters() if ".ref." in path).requires_grad_(True)
    before = everything(model)

    def fail(*_):
        raise RuntimeError("stop")

    hf.dpo_loss(model, pairs())
    handle = model.base_model.model.model.norm.register_forward_hook(fail)
    for name in ("ref", "__base__"):
        with pytest.raises(RuntimeError, match="stop"):
            hf.dpo_loss(model, pairs(), ref_adapter=name)
        assert everything(model) == before
    handle.remove()


def test_a_module_that_overrides_train_is_put_back():
    class Frozen(torch.nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model = torch.nn.Sequential(Frozen(2), torch.nn.Dropout())
    model[0].training = True
    with without_dropout(model):
        assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.modules())


def test_the_policy_is_not_its_reference():
    """Whatever it is called: get_peft_model has changed what it was given."""
    base = build("Llama")
    model = lora(base)
    for policy, reference in ((base, base), (model, base), (base, model), (model, model)):
        with pytest.raises(ValueError, match="ref_model should be another model than model"):
            hf.dpo_loss(policy, pairs(), reference)
    peft = pytest.importorskip("peft")
    base = build("Llama")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    hf.dpo_loss(peft.get_peft_model(base, config), pairs(), base)  # which leaves it as it was


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("name", [None, "ref", "frozen"])
def test_training_that_continues_an_adapter_starts_at_ln_2(name, target_modules):
    names = ("default", "frozen" if name == "frozen" else "ref")
    model = continued(names=names, target_modules=target_modules, lora_dropout=0.0).train()
    before = everything(model)
    out = hf.dpo_loss(model, pairs(), ref_adapter=name)
    assert out.loss.item() == LN2
    out.loss.backward()
    assert everything(model) == before
    assert all(".default." in path for path in gradients(model))

    base = hf.dpo_loss(model, pairs(), ref_adapter="__base__")
    assert abs(base.loss.item() - LN2) > 1e-3
    assert everything(model) == before
    with model.disable_adapter():
        data = pairs()
        expected = hf.sequence_logps(
            model, data["input_ids"], data["labels"], data["attention_mask"]
        )
    torch.testing.assert_close(reference_of(base), expected.detach(), rtol=1e-4, atol=1e-3)


def test_a_head_that_is_trained_in_full_has_a_frozen_copy():
    model = continued(modules_to_save=["lm_head"])
    before = everything(model)
    assert hf.dpo_loss(model, pairs()).loss.item() == LN2
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    out = hf.dpo_loss(model, pairs())
    twin = copy.deepcopy(model)
    twin.set_adapter("ref")
    data = pairs()
    expected = hf.sequence_logps(twin, data["input_ids"], data["labels"], data["attention_mask"])
    torch.testing.assert_close(reference_of(out), expected.detach(), rtol=1e-4, atol=1e-3)
    assert everything(model) == before


def test_flags_that_somebody_chose_stay():
    """The end of PEFT's disable_adapter makes every active adapter trainable."""
    model = lora(build("Llama"))
    for path, p in model.named_parameters():
        if "lora_A" in path:
            p.requires_grad_(False)
    before = everything(model)
    hf.dpo_loss(model, pairs()).loss.backward()
    assert everything(model) == before
    assert all("lora_B" in path for path in gradients(model))


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_base_that_gave_something_to_its_adapter_is_no_reference(how):
    """Training starts from both together."""
    data, before = pairs(), build("Llama")
    model = lora(build("Llama"), init_lora_weights=how)
    for name in (None, "__base__"):
        with pytest.raises(ValueError, match=rf"ref_model should be given: adapter .* by '{how}'"):
            hf.dpo_loss(model, data, ref_adapter=name)
    assert hf.dpo_loss(model, data, before).loss.item() == pytest.approx(LN2, abs=1e-4)


@pytest.mark.parametrize("trained", ["biases", "a norm", "the head beside its adapter"])
def test_what_is_trained_beside_adapters_is_no_reference(trained):
    if trained == "biases":
        model = lora(build("Phi"), bias="all")
    else:
        model = lora(build("Llama"), target_modules=["q_proj", "lm_head"])
        norm, head = model.base_model.model.model.norm, model.get_output_embeddings().base_layer
        (norm if trained == "a norm" else head).weight.requires_grad_(True)
    message = "ref_model should be given .* requires_grad=True: the reference would move"
    with pytest.raises(ValueError, match=message):
        hf.dpo_loss(model, pairs())
    with torch.no_grad():  # nothing is trained
        hf.dpo_loss(model, pairs())
    hf.dpo_loss(model, pairs(), copy.deepcopy(model))


def test_several_active_adapters():
    model = continued(names=("default", "other", "ref"))
    model.base_model.set_adapter(["default", "other"])
    before = everything(model)
    hf.dpo_loss(model, pairs())
    assert everything(model) == before
    for path, p in model.named_parameters():
        if ".other." in path:
            p.requires_grad_(False)
    # A frozen adapter under the trained one is a reference; the trained one is none.
    hf.dpo_loss(model, pairs(), ref_adapter="other")
    with pytest.raises(ValueError, match="ref_adapter should be a frozen adapter"):
        hf.dpo_loss(model, pairs(), ref_adapter="default")


def test_prompts_have_copies_too():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("Llama"), config)
    model.add_adapter("ref", config)
    weights = [model.prompt_encoder[name].embedding.weight for name in ("default", "ref")]
    with torch.no_grad():
        weights[1].copy_(weights[0])
    before = everything(model)
    out = hf.dpo_loss(model, pairs())
    assert out.loss.item() == LN2
    assert everything(model) == before
    out.loss.backward()
    assert weights[0].grad.abs().sum() > 0


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_model_without_its_prompt_is_the_reference(padding, by_hand):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = build("Llama")
    model = peft.get_peft_model(base, config)
    input_ids, attention_mask, labels = batch(padding=padding)
    expected = hf.sequence_logps(base, input_ids, labels, attention_mask).detach()
    disabled = model.disable_adapter() if by_hand else with_adapter(model, None)
    with torch.no_grad(), disabled:
        found = hf.sequence_logps(model, input_ids, labels, attention_mask)
    torch.testing.assert_close(found, expected)
    if padding == "right":
        out = hf.dpo_loss(model, pairs())
        torch.testing.assert_close(out.loss, hf.dpo_loss(model, pairs(), base).loss)
        out.loss.backward()
        assert model.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_compiled_models_compile_twice_and_no_more():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = continued().train(), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    counts = []
    for _ in range(4):
        out = hf.dpo_loss(compiled, pairs())
        out.loss.backward()
        assert out.loss.item() == pytest.approx(LN2, abs=1e-6)
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3


def test_bad_references_are_named():
    model, plain = continued(), build("Llama")
    three = torch.zeros(3)
    precomputed = pairs(ref_chosen_logps=three, ref_rejected_logps=three)
    others = continued(names=("default", "other"))
    only = continued(names=("default",))
    renamed = continued()
    renamed.set_adapter("ref")
    merged = continued()
    merged.merge_adapter()
    before = everything(merged)
    for policy, data, options, message in (
        (model, pairs(), {"ref_adapter": "reff"}, r"ref_adapter should be one of .*default.*ref"),
        (model, pairs(), {"ref_adapter": 3}, "ref_adapter should be the name"),
        (model, pairs(), {"ref_adapter": "default"}, "ref_adapter should be a frozen adapter"),
        (only, pairs(), {"ref_adapter": "default"}, "ref_adapter should be a frozen adapter"),
        (plain, pairs(), {"ref_adapter": "ref"}, "ref_adapter should be None for a model"),
        (model, pairs(), {"ref_adapter": "ref", "ref_model": plain}, "ref_adapter should be None"),
        (model, pairs(), {"ref_adapter": "ref", "reference_free": True}, "ref_adapter should be N"),
        (model, precomputed, {"ref_adapter": "ref"}, "ref_adapter should be None"),
        (others, pairs(), {}, r"ref_adapter should be given .*other"),
        (renamed, pairs(), {}, "ref_adapter should be given"),
        (merged, pairs(), {}, "model should have its adapters unmerged"),
        (plain, pairs(), {}, "ref_model should be given"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.dpo_loss(policy, data, **options)
    assert everything(merged) == before
    # What is asked for in so many words is done.
    hf.dpo_loss(others, pairs(), ref_adapter="__base__")
    hf.dpo_loss(others, pairs(), ref_adapter="other")
    hf.dpo_loss(renamed, pairs(), ref_adapter="__base__")
    hf.dpo_loss(model, pairs(), plain)
    hf.dpo_loss(model, precomputed)


def test_the_adapter_itself_is_put_back():
    model = continued()
    before = everything(model)
    with with_adapter(model, "ref"):
        assert model.active_adapters == ["ref"]
    assert everything(model) == before
