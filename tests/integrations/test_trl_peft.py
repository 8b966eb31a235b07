"""TRL's DPOTrainer on PEFT models of every kind, as it ships and with fastdpo: the same losses,
metrics and weights; and where TRL itself cannot, what happens with fastdpo.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import eager_token_logps
from test_hf_heads import cast_input
from test_trl import built, compare, model, train

from fastdpo.integrations import hf
from fastdpo.integrations.trl import patched

peft = pytest.importorskip("peft")

CAUSAL = {"task_type": "CAUSAL_LM"}
LORA = {"r": 4, **CAUSAL}
PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, encoder_dropout=0.0, **CAUSAL
    ),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix tuning, projected": peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **CAUSAL
    ),
}
# TRL 1.16 reads lm_head.weight and lm_head.bias itself. Where that is wrong it refuses the adapter
# when the trainer is built, or fails; with fastdpo what it does not refuse is trained.
REFUSED_BY_TRL = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}
TOKENS = {
    "of an untied head": (
        {},
        {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9, 11]}},
    ),
    "of a tied head": (
        {"tie_word_embeddings": True},
        {"trainable_token_indices": [3, 9, 11]},
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.filterwarnings("ignore")
def test_prompts_that_are_learned(case, tmp_path):
    compare(tmp_path, model, peft_config=PROMPTS[case], learning_rate=1.0)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_trained_in_full(tmp_path):
    compare(tmp_path, model, peft_config=peft.LoraConfig(modules_to_save=["lm_head"], **LORA))


@pytest.mark.parametrize("case", REFUSED_BY_TRL)
def test_adapters_that_trl_refuses_itself(case, tmp_path):
    config = peft.LoraConfig(**LORA, **REFUSED_BY_TRL[case])
    with patched(), pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        built(tmp_path, model(), False, peft_config=config)


@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.filterwarnings("ignore")
def test_tokens_of_the_head(case, tmp_path):
    """TRL itself cannot: the same steps are taken by the model's own logits."""
    config, options = TOKENS[case]
    adapter, sgd = peft.LoraConfig(**LORA, **options), {"max_grad_norm": 0.0}
    with pytest.raises(AttributeError, match="has no attribute 'bias'"):
        train(tmp_path, model(**config), False, peft_config=copy.deepcopy(adapter))

    policy = model(**config)
    constant = {"lr_scheduler_type": "constant", **sgd}
    trainer = built(tmp_path, policy, True, peft_config=copy.deepcopy(adapter), **constant)
    plain = copy.deepcopy(trainer.model)
    batches, own = [], trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        batches.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return own(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]

    losses = [eager_step(plain, batch) for batch in batches]
    assert logged == pytest.approx(losses, rel=2e-4)
    before = dict(peft.get_peft_model(model(**config), copy.deepcopy(adapter)).named_parameters())
    trained = dict(trainer.model.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(trained[name], p, atol=4e-4, rtol=4e-3)
        if "tokens_delta" in name:
            assert (p - before[name]).abs().max() > 1e-4


def eager_step(model, batch, beta=0.1, learning_rate=0.1):
    """A step of SGD on the DPO loss of logits."""
    labels = torch.where(batch["completion_mask"].bool(), batch["input_ids"], -100)

    def logps():
        given = {"attention_mask": batch["attention_mask"]}
        return eager_token_logps(model, batch["input_ids"], labels, **given).sum(-1)

    with torch.no_grad(), model.disable_adapter():
        reference = logps()
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen, rejected = (logps() - reference).chunk(2)
    loss = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    with torch.no_grad():
        for p, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p -= learning_rate * grad
    return loss.item()


@pytest.mark.parametrize("case", ["prompt tuning", "prefix tuning"])
@pytest.mark.filterwarnings("ignore")
def test_prompts_move_and_the_reference_has_none(case, tmp_path):
    """Else the runs above would coincide for nothing."""
    with patched():
        logged, trained = train(tmp_path, model(), False, peft_config=PROMPTS[case])
    fresh = peft.get_peft_model(model(), copy.deepcopy(PROMPTS[case]))
    moved = {
        name: (p - q).abs().max().item()
        for (name, p), q in zip(trained.named_parameters(), fresh.parameters(), strict=True)
        if p.requires_grad
    }
    assert moved
    assert all(distance > 0 for distance in moved.values())
    assert any(abs(row["rewards/chosen"]) > 1e-3 for row in logged)


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_outside_the_trainer(case):
    """The same model by dpo_loss: values and gradients are those of its own logits."""
    wrapped = peft.get_peft_model(model(), copy.deepcopy(PROMPTS[case]))
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 90, (4, 9), generator=generator)
    labels = torch.where(torch.arange(9) < 4, -100, input_ids)
    mask = torch.ones_like(input_ids)
    for _ in range(2):
        got = hf.sequence_logps(wrapped, input_ids, labels, mask)
        got.sum().backward()
        grads = [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
        wrapped.zero_grad()
        logits = wrapped(input_ids=input_ids, attention_mask=mask).logits[:, -9:-1].float()
        targets = labels[:, 1:]
        own = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        own = (own * (targets != -100)).sum(-1)
        own.sum().backward()
        expected = [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
        wrapped.zero_grad()
        torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-4)
        assert grads
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("below", ["a hook", "nothing"])
def test_an_fp32_head_on_a_bf16_backbone(below, tmp_path):
    """What casts what the head is given is a hook on it, or autocast off and fp32 in the backbone's
    last layer. The backbone's own roundings are larger than what could differ in the head."""

    def make():
        made = model().bfloat16()
        made.lm_head.float()
        if below == "a hook":
            made.lm_head.register_forward_pre_hook(cast_input)
        else:
            made.model.norm.register_forward_hook(lambda module, args, output: output.float())
        return made

    runs = []
    for fast in (False, True):
        logged, trained = train(tmp_path, make(), fast, reference=make(), learning_rate=0.01)
        assert trained.lm_head.weight.dtype == torch.float32
        runs.append((logged, trained.lm_head.weight.detach()))
    (base, weight), (ours, our_weight) = runs
    for a, b in zip(ours, base, strict=True):
        for key in ("loss", "logps/chosen", "logps/rejected"):
            assert a[key] == pytest.approx(b[key], rel=5e-3), key
    start = make().lm_head.weight
    assert (our_weight - weight).norm() <= 0.02 * (weight - start).norm()
