"""PEFT on the output head: what it costs, and that values and gradients are those of the model's
own logits, for every kind of adapter that the head may have.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hf_models import assert_same_gradients, batch, build, eager_token_logps, gradients
from oracle import assert_as_accurate
from test_extra_columns import Fresh
from test_hf_capture import CLOSE, disturb, lora
from torch import nn

from fastdpo.integrations import hf

WIDE = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 1}
RANK = 4  # of test_hf_capture.lora


def on_head(model, **options):
    model = lora(model, **{"target_modules": ["lm_head"], **options})
    disturb(model)
    return model


@pytest.mark.parametrize(
    ("workspace", "backward"), [(None, 1 + 2 * RANK / 256), (0, 2 + 3 * RANK / 256)]
)
def test_lora_on_a_frozen_head_costs_r_columns(workspace, backward):
    """Where E is kept: the frozen head's two products, and r columns three times. Nothing of the
    weight's size is made."""
    model, (input_ids, mask, labels) = on_head(build("Llama", **WIDE)), batch()
    options = {"workspace_bytes": workspace}
    hf.sequence_logps(model, input_ids, labels, mask, **options)  # the probe
    count, weight = int((labels[:, 1:] != -100).sum()), model.get_output_embeddings().weight
    unit = 2 * count * weight.numel()
    with Fresh() as there:
        logps = hf.sequence_logps(model, input_ids, labels, mask, **options)
    with Fresh() as back:
        logps.sum().backward()
    # The head's products are thousands of times those of the layer below it.
    assert there.operations / unit == pytest.approx(1 + RANK / 256, abs=0.2)
    assert back.operations / unit == pytest.approx(backward, abs=0.2)
    assert max(there.largest_made, back.largest_made) < weight.nbytes / 4
    assert weight.grad is None


def test_a_head_that_is_trained_beside_its_adapter_has_both_gradients():
    model, (input_ids, mask, labels) = on_head(build("Llama")), batch()
    head = model.get_output_embeddings()
    head.base_layer.weight.requires_grad_()
    logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    own = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    (own * (targets != -100)).sum().backward()
    expected = [p.grad.clone() for p in head.parameters()]
    model.zero_grad()
    hf.sequence_logps(model, input_ids, labels, mask).sum().backward()
    for got, want in zip([p.grad for p in head.parameters()], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- Every kind of adapter, against the model's own logits


TOKENS = [3, 7, 11, 40]
BOTH = {"embed_tokens": [3, 7], "lm_head": [5, 7, 40]}
CASES = {
    "dora": ("Llama", {"use_dora": True}),
    "dora on a head with a bias": ("Phi", {"use_dora": True}),
    "dora in a family that scales": ("Granite", {"use_dora": True}),
    "dora in a family that caps": ("Gemma2", {"use_dora": True}),
    "rank-stabilised dora": ("Llama", {"use_dora": True, "use_rslora": True}),
    "rank-stabilised lora": ("Llama", {"use_rslora": True}),
    "lora with a bias": ("Llama", {"lora_bias": True}),
    "lora with a bias beside the head's": ("Phi", {"lora_bias": True}),
    "pissa": ("Llama", {"init_lora_weights": "pissa"}),
    # Tied heads.
    "lora on the embedding": ("Qwen2", {"target_modules": ["embed_tokens"]}),
    "lora on both": ("Qwen2", {"target_modules": ["embed_tokens", "lm_head"]}),
    "lora on the embedding, tied": (
        "Qwen2",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "dora on the embedding, tied": (
        "Qwen2",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
    ),
    "a trained embedding": (
        "Qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "a trained embedding, tied": (
        "Qwen2",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    # Single rows.
    "tokens of an untied embedding": (
        "Llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    ),
    "tokens of an untied head": (
        "Llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": BOTH},
    ),
    "tokens of a tied head": (
        "Qwen2",
        {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    ),
    "other tokens of a tied head": (
        "Qwen2",
        {"target_modules": ["q_proj"], "trainable_token_indices": BOTH},
    ),
    "tokens of a tied head and lora on it": (
        "Qwen2",
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": TOKENS},
    ),
    "tokens of a head whose family scales": (
        "Granite",
        {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    ),
}


def make(case):
    family, options = CASES[case]
    model = build(family)
    with torch.no_grad():  # the row of padding is 0 in tied heads, and DoRA divides by its size
        nn.init.normal_(model.get_output_embeddings().weight[:1], std=0.4)
    return lora(model, **{"target_modules": ["q_proj", "lm_head"], **options})


def compare(model):
    """Values and gradients, with a probe and without."""
    input_ids, mask, labels = batch()
    upstream = torch.linspace(-1.0, 2.0, len(labels))
    expected = eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)
    (expected * upstream).sum().backward()
    expected_grads = gradients(model)
    for _ in range(2):
        got = hf.sequence_logps(model, input_ids, labels, mask)
        (got * upstream).sum().backward()
        torch.testing.assert_close(got, expected, **CLOSE)
        assert_same_gradients(gradients(model), expected_grads)
    return got


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    model, (input_ids, mask, labels) = make(case), batch()
    hf.sequence_logps(model, input_ids, labels, mask)  # probed while adapters do nothing yet
    disturb(model)
    adapted = compare(model)
    with model.disable_adapter():
        expected = eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)
        got = hf.sequence_logps(model, input_ids, labels, mask)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (got - adapted).abs().max() > 1e-3
    if case.startswith("lora with a bias") and CASES[case][0] == "Llama":
        return  # PEFT cannot merge it
    if "tied" in case and "embedding" in case:
        return  # nor what two layers share
    model.merge_adapter()
    expected = eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)
    got = hf.sequence_logps(model, input_ids, labels, mask)
    torch.testing.assert_close(got, expected, **CLOSE)


def pairs():
    input_ids, mask, labels = batch(sequences=6)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


LN2 = torch.tensor(math.log(2.0)).item()


@pytest.mark.parametrize("case", [c for c in CASES if c != "pissa"])
def test_an_untrained_adapter_is_its_reference_to_the_bit(case):
    assert hf.dpo_loss(make(case).train(), pairs()).loss.item() == LN2


# What PEFT 0.21 makes of a second adapter.
NO_SECOND = {
    "pissa": "PEFT takes each adapter out of the weight",
    "lora on the embedding, tied": "PEFT ties the first one alone to the head",
    "dora on the embedding, tied": "PEFT ties the first one alone to the head",
    "tokens of a tied head and lora on it": "PEFT refuses to add it",
}


def with_frozen_copy(case, name):
    """A model whose adapter is trained, and a copy of it under another name."""
    model = make(case)
    disturb(model)
    model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    state = dict(model.named_parameters())
    with torch.no_grad():
        for path, p in state.items():
            if "default" in path.split("."):
                state[path.replace("default", name)].copy_(p)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["ref", "frozen"])
def test_a_named_reference(case, name):
    if case in NO_SECOND:
        pytest.skip(f"no second adapter: {NO_SECOND[case]}")
    model, data = with_frozen_copy(case, name).train(), pairs()
    requires = [p.requires_grad for p in model.parameters()]
    options = {"ref_adapter": None if name == "ref" else name}
    assert hf.dpo_loss(model, data, **options).loss.item() == LN2
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "default" in path.split("."):
                p.mul_(1.5)
    out = hf.dpo_loss(model, data, **options)
    assert [p.requires_grad for p in model.parameters()] == requires
    out.loss.backward()
    assert not any(name in path.split(".") for path in gradients(model))
    twin = copy.deepcopy(model).eval()
    twin.set_adapter(name)
    with torch.no_grad():
        expected = eager_token_logps(
            twin, data["input_ids"], data["labels"], attention_mask=data["attention_mask"]
        ).sum(-1)
    logps = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
    rewards = torch.cat([out.chosen_rewards, out.rejected_rewards])
    torch.testing.assert_close(logps - rewards / 0.1, expected, rtol=1e-4, atol=1e-3)
    assert rewards.abs().max() > 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_on_the_head_is_peft_s(dora):
    """The same noise, drawn by the same call: DoRA drops in the base's product too."""
    options = {"target_modules": ["lm_head"], "lora_dropout": 0.3, "use_dora": dora}
    model = lora(build("Phi" if dora else "Llama"), **options)
    disturb(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora" not in name:
            module.p = 0.0
    model.train()
    input_ids, mask, labels = batch()
    hf.sequence_logps(model, input_ids, labels, mask)
    torch.manual_seed(3)
    expected = eager_token_logps(model, input_ids, labels, attention_mask=mask)
    expected.sum().backward()
    expected_grads = gradients(model)
    torch.manual_seed(3)
    got = hf.sequence_logps(model, input_ids, labels, mask, per_token=True)
    got.sum().backward()
    torch.testing.assert_close(got, expected, **CLOSE)
    assert_same_gradients(gradients(model), expected_grads)
    quiet = hf.sequence_logps(model.eval(), input_ids, labels, mask, per_token=True)
    assert (quiet - got).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["dora", "lora with a bias", "tokens of a tied head"])
def test_16_bits_keep_the_rule_of_accuracy(case):
    model = make(case)
    disturb(model)
    model = model.to(torch.bfloat16)
    for name, p in model.named_parameters():  # as PEFT makes them
        if "lora" in name:
            p.data = p.data.float()
    input_ids, mask, labels = batch()
    taken = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    with torch.no_grad():
        base = eager_token_logps(model, input_ids, labels, attention_mask=mask)
        handle.remove()
        got = hf.sequence_logps(model, input_ids, labels, mask, per_token=True)
        logits = copy.deepcopy(head).double()(taken[0].double())[:, :-1]
    targets = labels[:, 1:]
    exact = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    exact = nn.functional.pad(exact * (targets != -100), (1, 0))
    assert_as_accurate(got, base, exact, 2, "logps")


def test_several_active_adapters():
    peft = pytest.importorskip("peft")
    model = lora(build("Llama"), target_modules=["q_proj", "lm_head"])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], lora_bias=True)
    model.add_adapter("second", config)
    third = peft.LoraConfig(r=2, target_modules=["q_proj"])  # leaves the head alone
    model.add_adapter("third", third)
    model.base_model.set_adapter(["default", "second", "third"])
    disturb(model)
    compare(model)
    model.base_model.set_adapter(["second"])
    compare(model)
    model.base_model.set_adapter(["third"])
    compare(model)


def test_trainable_tokens_by_themselves():
    peft = pytest.importorskip("peft")
    for family, layer in (("Llama", "lm_head"), ("Qwen2", "embed_tokens"), ("Phi", "lm_head")):
        config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=[layer])
        model = peft.get_peft_model(build(family), config)
        disturb(model)
        compare(model)  # of Phi, without the head's bias, which PEFT leaves out there
        with model.disable_adapter():
            input_ids, mask, labels = batch()
            expected = eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)
            got = hf.sequence_logps(model, input_ids, labels, mask)
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("case", ["dora", "lora with a bias", "tokens of an untied head"])
def test_read_head(case):
    model = make(case)
    disturb(model)
    head = hf.read_head(model)
    hidden = torch.randn(5, 32)
    got = hidden @ head.weight.t() + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(got, model.get_output_embeddings()(hidden), **CLOSE)


@pytest.mark.exhaustive
def test_compiled():
    torch._dynamo.reset()
    for case in ("dora", "tokens of an untied head"):
        model, (input_ids, mask, labels) = make(case), batch()
        disturb(model)
        expected = eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)
        compiled = torch.compile(model, backend="eager", dynamic=False)
        for _ in range(3):
            got = hf.sequence_logps(compiled, input_ids, labels, mask)
            torch.testing.assert_close(got, expected, **CLOSE)


def refused(model, message):
    input_ids, mask, labels = batch()
    for call in (
        lambda: hf.sequence_logps(model, input_ids, labels, mask),
        lambda: hf.read_head(model),
    ):
        with pytest.raises(hf.UnsupportedModel, match=message):
            call()


def test_refusals():
    peft = pytest.importorskip("peft")
    model = lora(build("Llama"), target_modules=["lm_head"], velora_config=peft.VeloraConfig())
    refused(model, r"LoRA variant that fastdpo does not know .*\(VeloraLinearVariant\)")

    model = lora(build("Llama"), target_modules=["lm_head"], use_dora=True)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    refused(model, "is DoRA and one of several active ones")

    options = {"target_modules": ["lm_head"], "trainable_token_indices": TOKENS}
    refused(lora(build("Qwen2"), use_dora=True, **options), "DoRA adapter on trainable_token_ind")

    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    refused(peft.get_peft_model(build("Llama"), config), "is wrapped in PEFT's Linear; on the head")
