"""Heads that bitsandbytes has quantized, by bitsandbytes itself: its kernels for CPUs compute what
those for GPUs do, and LLM.int8() in eval mode alone.
"""

from __future__ import annotations

import math

import hf_models
import pytest
import torch
from hf_models import assert_same_gradients, build, eager_token_logps, gradients
from oracle import assert_as_accurate
from test_hf_capture import CLOSE, disturb, lora
from torch import nn

from fastdpo.integrations import hf, quantized

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def bnb():
    reason = "bitsandbytes is not installed (pip install --no-deps bitsandbytes runs these tests)"
    return pytest.importorskip("bitsandbytes", reason=reason)


def four_bit(bnb, model, **options):
    return _with_head(model, lambda *size, **o: bnb.nn.Linear4bit(*size, **o, **options))


def eight_bit(bnb, model, **options):
    options = {"has_fp16_weights": False, **options}
    return _with_head(model, lambda *size, **o: bnb.nn.Linear8bitLt(*size, **o, **options))


def _with_head(model, make):
    own = model.lm_head
    head = make(own.in_features, own.out_features, bias=own.bias is not None)
    head.load_state_dict(own.state_dict())
    model.lm_head = head.to(own.weight.dtype).to("cpu")
    return model.eval()


def batch(**options):
    """With positions: else those of padding are ours, and LLM.int8() looks at padding too when it
    looks for outliers.
    """
    input_ids, mask, labels = hf_models.batch(**options)
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return input_ids, labels, {"attention_mask": mask, "position_ids": positions}


HEADS = {
    "nf4": (four_bit, {"quant_type": "nf4"}),
    "fp4, no double quantization": (
        four_bit,
        {"quant_type": "fp4", "compress_statistics": False},
    ),
    "int8": (eight_bit, {}),
    "int8 with outliers": (eight_bit, {"threshold": 1.5}),
}


def compare(model):
    """Values and gradients against the model's own logits, with a probe and without.

    bitsandbytes' LLM.int8() for CPUs multiplies by 6.200124e-05 where 1 / 127² = 6.2000124e-05 is
    meant (its kernels for GPUs do): its logits are 2e-5 too large.
    """
    input_ids, labels, given = batch()
    base = getattr(model.get_output_embeddings(), "base_layer", model.get_output_embeddings())
    eight = hasattr(base, "state") and not model.training
    tolerance = {"atol": 2e-3, "rtol": 5e-5} if eight else CLOSE
    upstream = torch.linspace(-1.0, 2.0, len(labels))
    for _ in range(2):
        expected = eager_token_logps(model, input_ids, labels, **given).sum(-1)
        (expected * upstream).sum().backward()
        expected_grads = gradients(model)
        got = hf.sequence_logps(model, input_ids, labels, **given)
        (got * upstream).sum().backward()
        torch.testing.assert_close(got, expected, **tolerance)
        if eight:
            compare_gradients(gradients(model), expected_grads)
        else:
            assert_same_gradients(gradients(model), expected_grads)


def compare_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert (got[name] - want).norm() <= 2e-4 * want.norm() + 1e-6, name


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("family", ["Llama", "Phi", "Granite"])
@pytest.mark.parametrize("training", [False, True])
def test_against_the_models_own_logits(bnb, case, family, training):
    quantize, options = HEADS[case]
    model = quantize(bnb, build(family, attention_dropout=0.0), **options)
    if family == "Phi":  # whose modules drop in training
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    compare(model.train(training))


def heads_input(model, input_ids, given):
    taken = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: taken.append(args[0].detach())
    )
    with torch.no_grad():
        model(input_ids=input_ids, **given)
    handle.remove()
    return taken[0]


def rounded(hidden, threshold):
    """LLM.int8()'s activations, transcribed: fp16, the rows' largest sizes, columns left out. The
    integers in fp32, as there: half an integer is to be rounded to the same side.
    """
    x = hidden.half().float().flatten(0, -2)
    outliers = x.abs() >= (threshold or torch.inf)
    size = torch.where(outliers, 0.0, x).abs().amax(1, keepdim=True)
    q = (x * (127.0 / size)).round().double()
    plain = hidden.double().flatten(0, -2)
    return torch.where(outliers.any(0), plain, q * size.double() / 127.0).view(hidden.shape)


def oracle_logps(model, hidden, labels):
    """fp64, from what the head is given in the dtype that it has."""
    layer = model.get_output_embeddings()
    if isinstance(getattr(layer, "weight", None), torch.Tensor) and hasattr(layer, "state"):
        weight = layer.state.CB.double() * layer.state.SCB.double().unsqueeze(1) / 127.0
        x = hidden.double() if layer.training else rounded(hidden, layer.state.threshold)
    else:
        weight, x = quantized.layer_weight(layer).double(), hidden.double()
    logits = (x @ weight.t())[:, :-1]
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return nn.functional.pad(logps * (targets != -100), (1, 0))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_the_rule_of_accuracy(bnb, dtype, case, training):
    quantize, options = HEADS[case]
    model = build("Llama", hidden_size=128, initializer_range=0.1).to(dtype)
    model = quantize(bnb, model, **options).train(training)
    input_ids, labels, given = batch()
    with torch.no_grad():
        base = eager_token_logps(model, input_ids, labels, **given)
        exact = oracle_logps(model, heads_input(model, input_ids, given), labels)
        for _ in range(2):
            got = hf.sequence_logps(model, input_ids, labels, **given, per_token=True)
            assert_as_accurate(got, base, exact, 2, "logps")


@pytest.mark.parametrize("compute", [None, FP32, BF16])
def test_the_compute_dtype_is_the_layers_whatever_autocast_says(bnb, compute):
    model = four_bit(bnb, build("Llama", initializer_range=0.1), compute_dtype=compute)
    model.model.norm.register_forward_hook(lambda module, args, output: output.float())
    input_ids, labels, given = batch()
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", BF16):
            hidden = heads_input(model, input_ids, given)
            base = eager_token_logps(model, input_ids, labels, **given)
            got = hf.sequence_logps(model, input_ids, labels, **given, per_token=True)
        exact = oracle_logps(model, hidden.to(compute or hidden.dtype), labels)
        assert_as_accurate(got, base, exact, 2, "logps")
        if compute is not BF16:  # bitsandbytes' own product for CPUs is autocast's all the same
            torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


def loaded(model, bits):
    """As from_pretrained leaves it, which is where PEFT looks."""
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_lora_on_a_quantized_head(bnb, case, training):
    quantize, options = HEADS[case]
    model = loaded(quantize(bnb, build("Llama"), **options), 4 if quantize is four_bit else 8)
    model = lora(model, target_modules=["q_proj", "lm_head"]).train(training)
    assert type(model.get_output_embeddings()).__module__ == "peft.tuners.lora.bnb"
    disturb(model)
    compare(model)


@pytest.mark.parametrize("training", [False, True])
def test_dora_on_a_quantized_head(bnb, training):
    model = loaded(four_bit(bnb, build("Llama")), 4)
    model = lora(model, target_modules=["lm_head"], use_dora=True).train(training)
    disturb(model)
    compare(model)
    model = loaded(eight_bit(bnb, build("Llama")), 8)
    model = lora(model, target_modules=["lm_head"], use_dora=True)
    refused(model, "DoRA adapter on bitsandbytes' Linear8bitLt")


def test_qlora_starts_at_ln_2(bnb):
    for quantize, bits in ((four_bit, 4), (eight_bit, 8)):
        for options in ({"target_modules": ["q_proj"]}, {"target_modules": ["lm_head"]}):
            model = loaded(quantize(bnb, build("Llama")), bits)
            model = lora(model, **options).train()
            input_ids, labels, given = batch(sequences=6)
            pairs = {"input_ids": input_ids, "labels": labels, **given}
            out = hf.dpo_loss(model, pairs)
            assert out.loss.item() == torch.tensor(math.log(2.0)).item()
            assert all(m.training for m in model.modules())


@pytest.mark.parametrize("target_modules", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_named_reference_under_qlora(bnb, target_modules):
    model = loaded(four_bit(bnb, build("Llama")), 4)
    model = lora(model, target_modules=target_modules)
    disturb(model)
    model.add_adapter("frozen", model.peft_config["default"])
    state = dict(model.named_parameters())
    with torch.no_grad():
        for path, p in state.items():
            if "default" in path.split("."):
                state[path.replace("default", "frozen")].copy_(p)
    input_ids, labels, given = batch(sequences=6)
    pairs = {"input_ids": input_ids, "labels": labels, **given}
    ln_2 = torch.tensor(math.log(2.0)).item()
    assert hf.dpo_loss(model, pairs, ref_adapter="frozen").loss.item() == ln_2
    assert abs(hf.dpo_loss(model, pairs, ref_adapter="__base__").loss.item() - ln_2) > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_is_dequantized_once_a_call_and_kept_by_nobody(bnb, bits, monkeypatch):
    model = (four_bit if bits == 4 else eight_bit)(bnb, build("Llama"))
    input_ids, labels, given = batch()
    hf.sequence_logps(model, input_ids, labels, **given)
    made, own = [], quantized.dequantized_layer

    def counted(layer, hidden):
        hidden, weight = own(layer, hidden)
        made.append(torch.utils.weak.WeakIdRef(weight))
        return hidden, weight

    monkeypatch.setattr("fastdpo.integrations.heads.dequantized_layer", counted)
    logps = hf.sequence_logps(model, input_ids, labels, **given)
    assert len(made) == 1
    assert made[0]() is None  # gone before the backward
    logps.sum().backward()


def test_read_head(bnb):
    model = four_bit(bnb, build("Phi"))
    head = hf.read_head(model)
    assert torch.equal(head.weight, quantized.layer_weight(model.lm_head))
    assert torch.equal(head.bias, model.lm_head.bias)
    with pytest.raises(hf.UnsupportedModel, match="Linear8bitLt, which rounds its hidden states"):
        hf.read_head(eight_bit(bnb, build("Llama")))


def refused(model, message):
    input_ids, labels, given = batch()
    for call in (
        lambda: hf.sequence_logps(model, input_ids, labels, **given),
        lambda: hf.read_head(model),
    ):
        with pytest.raises(hf.UnsupportedModel, match=message):
            call()


def test_refusals(bnb):
    refused(
        eight_bit(bnb, build("Llama"), has_fp16_weights=True), "with has_fp16_weights=True, whose"
    )

    model = build("Llama")
    model.lm_head = bnb.nn.Linear8bitLt(32, 53, bias=False, has_fp16_weights=False)
    refused(model, "bitsandbytes' Linear8bitLt, not quantized yet")
    model.lm_head = bnb.nn.Linear4bit(32, 53, bias=False)
    refused(model, "bitsandbytes' Linear4bit, not quantized yet")

    model = four_bit(bnb, build("Llama"))
    model.lm_head.weight.quant_state.packing_format_for_cpu = True  # as AVX512-BF16 has it
    refused(model, "packed anew for inference .* support_avx512bf16_for_cpu=False")

    model = four_bit(bnb, build("Llama"))
    model.lm_head.weight.quant_state.shape = torch.Size([32, 53])
    refused(model, r"quantized as \[32, 53\] instead of \[V, D\]")


def test_a_layer_of_that_name_with_a_forward_of_its_own_is_refused():
    """Without bitsandbytes: a stand-in."""
    layer = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    layer.forward = lambda self, x: x @ self.weight.T
    own = type("Mine", (layer,), {"forward": lambda self, x: 2 * (x @ self.weight.T)})
    model = build("Llama")
    model.lm_head = own(32, model.config.vocab_size, bias=False)
    refused(model, "its output head is a Mine, whose arithmetic")
