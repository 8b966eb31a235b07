"""Heads that are more than a linear layer with a plain weight: hooks that cast, quantized weights,
copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hf_models import assert_same_gradients, batch, build, eager_token_logps, gradients
from test_hf_capture import CLOSE, disturb, lora
from torch import nn

from fastdpo.integrations import hf

BF16 = torch.bfloat16


def logps(model, input_ids, mask, labels):
    return eager_token_logps(model, input_ids, labels, attention_mask=mask).sum(-1)


def compare(model, **tolerance):
    """Log-probabilities and gradients against the model's own logits, with a probe and without."""
    input_ids, mask, labels = batch()
    upstream = torch.linspace(-1.0, 2.0, len(labels))
    expected = logps(model, input_ids, mask, labels)
    (expected * upstream).sum().backward()
    expected_grads = gradients(model)
    assert expected_grads
    for _ in range(2):
        got = hf.sequence_logps(model, input_ids, labels, mask)
        (got * upstream).sum().backward()
        torch.testing.assert_close(got, expected, **(tolerance or CLOSE))
        assert_same_gradients(gradients(model), expected_grads)


def cast_input(module, args):
    return tuple(a.to(torch.float32) for a in args)


def cast_keywords(module, args, kwargs):
    return cast_input(module, args), {name: value.float() for name, value in kwargs.items()}


def with_fp32_head(model, dtype=BF16, hook=cast_input, **options):
    """As TRL's cast_lm_head_to_fp32 makes it."""
    model = model.to(dtype)
    model.lm_head.float().register_forward_pre_hook(hook, **options)
    return model


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi"])
@pytest.mark.parametrize("keywords", [False, True])
def test_an_fp32_head_on_a_16_bit_backbone(family, dtype, keywords):
    options = {"tie_word_embeddings": False} if family == "Gemma2" else {}
    hook = {"hook": cast_keywords, "with_kwargs": True} if keywords else {}
    model = with_fp32_head(build(family, **options), dtype, **hook)
    input_ids, mask, labels = batch()
    expected = logps(model, input_ids, mask, labels)
    expected.sum().backward()
    base = gradients(model)
    for _ in range(2):
        got = hf.sequence_logps(model, input_ids, labels, mask)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, **CLOSE)  # the head's products are fp32's
        got.sum().backward()
        for name, grad in gradients(model).items():
            assert grad.dtype == base[name].dtype
            limit = 2e-5 if grad.dtype == torch.float32 else 2e-2
            assert (grad - base[name]).norm() <= limit * base[name].norm() + 1e-6, name


def test_a_head_whose_input_the_model_casts():
    """`hidden.to(self.lm_head.weight.dtype)` in the model, and no hook."""
    model = build("Llama").bfloat16()
    model.lm_head.float()
    model.model.register_forward_hook(_cast_output_for(model))
    input_ids, mask, labels = batch()
    expected = logps(model, input_ids, mask, labels)
    torch.testing.assert_close(hf.sequence_logps(model, input_ids, labels, mask), expected, **CLOSE)


def test_an_fp32_head_that_nothing_casts_for_fails_as_the_model_does():
    model, (input_ids, mask, labels) = build("Llama").bfloat16(), batch()
    model.lm_head.float()
    for call in (
        lambda: model(input_ids=input_ids),
        lambda: hf.sequence_logps(model, input_ids, labels, mask),
    ):
        with pytest.raises(RuntimeError, match="same dtype"):
            call()


@pytest.mark.parametrize("target_modules", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_fp32_head_starts_at_ln_2(target_modules):
    model = lora(with_fp32_head(build("Llama")), target_modules=target_modules).train()
    input_ids, mask, labels = batch(sequences=6)
    pairs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    out = hf.dpo_loss(model, pairs)
    assert out.loss.item() == torch.tensor(2.0).log().item()
    assert out.chosen_logps.dtype == torch.float32


def _cast_output_for(model):
    def cast(module, args, output):
        output.last_hidden_state = output.last_hidden_state.to(model.lm_head.weight.dtype)
        return output

    return cast


def test_what_a_hook_gives_the_head_is_what_it_multiplies():
    model = build("Llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    model.lm_head.register_forward_hook(lambda module, args, output: output.float())
    compare(model)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {}])
def test_casting_hooks_inside_an_adapter(options):
    """The hook stays on the layer that the adapter wraps."""
    options = options or {"target_modules": ["q_proj", "lm_head"]}
    model = lora(with_fp32_head(build("Llama")), **options)
    disturb(model)
    input_ids, mask, labels = batch()
    expected = logps(model, input_ids, mask, labels)
    expected.sum().backward()
    base = gradients(model)
    for _ in range(2):
        got = hf.sequence_logps(model, input_ids, labels, mask)
        torch.testing.assert_close(got, expected, **CLOSE)
        got.sum().backward()
        for name, grad in gradients(model).items():
            assert (grad - base[name]).norm() <= 2e-2 * base[name].norm() + 1e-6, name


def test_a_casting_hook_under_autocast():
    model = build("Llama")
    model.lm_head.register_forward_pre_hook(cast_input)
    input_ids, mask, labels = batch()
    exact = logps(model, input_ids, mask, labels)
    with torch.autocast("cpu", BF16):
        expected = logps(model, input_ids, mask, labels)
        got = hf.sequence_logps(model, input_ids, labels, mask)
    assert (got - exact).norm() <= 1.5 * (expected - exact).norm()


def test_a_head_that_is_given_more_than_hidden_states_is_refused():
    model, (input_ids, mask, labels) = build("Llama"), batch()
    model.lm_head.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"adapter_names": ["a", "b"]}), with_kwargs=True
    )
    with pytest.raises(hf.UnsupportedModel, match=r"nothing else, got .*adapter_names"):
        hf.sequence_logps(model, input_ids, labels, mask)
    assert "forward" not in vars(model.lm_head)


def test_a_forward_of_the_heads_own_is_put_back():
    """accelerate's hooks replace it."""
    model, (input_ids, mask, labels) = build("Llama"), batch()
    own = model.lm_head.forward
    calls = []

    def forward(hidden):
        calls.append(hidden.shape)
        return own(hidden)

    model.lm_head.forward = forward
    expected = logps(model, input_ids, mask, labels)
    calls.clear()
    for _ in range(2):
        got = hf.sequence_logps(model, input_ids, labels, mask)
        torch.testing.assert_close(got, expected, **CLOSE)
        assert model.lm_head.forward is forward
    assert calls[-2:] == [(1, 16, 32), (4, 0, 32)]  # the probe's, then none


def test_a_compiled_head_keeps_its_hooks():
    model, (input_ids, mask, labels) = build("Llama"), batch()
    model.lm_head.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    expected = logps(model, input_ids, mask, labels)
    model.lm_head = torch.compile(model.lm_head, backend="eager", dynamic=False)
    for _ in range(3):
        got = hf.sequence_logps(model, input_ids, labels, mask)
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.fixture
def torchao():
    reason = "torchao is not installed (pip install --no-deps torchao runs these tests)"
    pytest.importorskip("torchao", reason=reason)
    import torchao.quantization as quantization

    return quantization


def quantize_head(model, quantization, config):
    quantization.quantize_(model, config, lambda module, name: name.endswith("lm_head"))
    assert type(model.lm_head.weight) is not nn.Parameter
    return model


def counted_dequantizations(monkeypatch, weight):
    calls, dequantize = [], type(weight).dequantize

    def counted(self, *args, **kwargs):
        calls.append(self)
        return dequantize(self, *args, **kwargs)

    monkeypatch.setattr(type(weight), "dequantize", counted)
    return calls


@pytest.mark.parametrize("family", ["Llama", "Phi", "Granite"])
def test_a_head_whose_weight_torchao_quantized(torchao, family, monkeypatch):
    model = quantize_head(build(family), torchao, torchao.Int8WeightOnlyConfig())
    compare(model)
    assert model.lm_head.weight.grad is None
    calls = counted_dequantizations(monkeypatch, model.lm_head.weight)
    input_ids, mask, labels = batch()
    hf.sequence_logps(model, input_ids, labels, mask)
    assert len(calls) == 1
    with torch.no_grad():
        read = hf.read_head(model)
    assert torch.equal(read.weight, model.lm_head.weight.dequantize())


def test_a_quantized_head_in_bf16_and_under_an_adapter(torchao):
    model = build("Llama").bfloat16()
    model = quantize_head(model, torchao, torchao.Int8WeightOnlyConfig())
    input_ids, mask, labels = batch()
    exact = copy.deepcopy(model)
    exact.lm_head.weight = nn.Parameter(model.lm_head.weight.dequantize().float())
    exact = logps(exact.float(), input_ids, mask, labels)
    base = logps(model, input_ids, mask, labels)
    got = hf.sequence_logps(model, input_ids, labels, mask)
    assert (got - exact).norm() <= 1.5 * (base - exact).norm()

    model = quantize_head(build("Llama"), torchao, torchao.Int8WeightOnlyConfig())
    model = lora(model, target_modules=["q_proj", "lm_head"])
    disturb(model)
    compare(model)


def test_a_head_that_quantizes_its_input_is_refused(torchao):
    config = torchao.Int8DynamicActivationInt8WeightConfig()
    model = quantize_head(build("Llama"), torchao, config)
    input_ids, mask, labels = batch()
    for call in (
        lambda: hf.sequence_logps(model, input_ids, labels, mask),
        lambda: hf.read_head(model),
    ):
        with pytest.raises(hf.UnsupportedModel, match="Int8Tensor, which quantizes the hidden"):
            call()


class Wrapped(torch.Tensor):
    """A tensor of somebody's own, as those that quantize are made."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner)
        raise NotImplementedError(function)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].value(), *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    def value(self):
        return self.inner


class Halved(Wrapped):
    def dequantize(self):
        return self.value()

    def value(self):
        return 0.5 * self.inner


class Trained(Halved):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=True
        )


def with_weight(kind, **attributes):
    model = build("Llama")
    weight = kind(model.lm_head.weight.detach())
    vars(weight).update(attributes)
    model.lm_head._parameters["weight"] = weight
    return model


def test_any_tensor_that_tells_its_weight_is_read():
    compare(with_weight(Halved))
    compare(with_weight(Halved, activation_dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        (Wrapped, {}, "test_hf_heads's Wrapped, a tensor that fastdpo cannot read"),
        (Halved, {"act_quant_kwargs": {}}, r"Halved, which quantizes .*\(act_quant_kwargs\)"),
        (Halved, {"activation_dtype": torch.float8_e4m3fn}, r"which quantizes .*activation_dtype"),
        (Trained, {}, "Trained and requires a gradient"),
    ],
)
def test_tensors_that_cannot_be_read_are_named(kind, attributes, message):
    model, (input_ids, mask, labels) = with_weight(kind, **attributes), batch()
    with pytest.raises(hf.UnsupportedModel, match=message):
        hf.sequence_logps(model, input_ids, labels, mask)
    with pytest.raises(hf.UnsupportedModel, match=message):
        hf.read_head(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_weight_of_eight_bits_is_refused(dtype):
    model, (input_ids, mask, labels) = build("Llama"), batch()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(dtype), False)
    with pytest.raises(hf.UnsupportedModel, match=r"quantized .*float8"):
        hf.sequence_logps(model, input_ids, labels, mask)


def test_a_copy_is_probed_and_answers_for_itself():
    model, (input_ids, mask, labels) = build("Llama"), batch()
    hf.sequence_logps(model, input_ids, labels, mask)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    expected = logps(twin, input_ids, mask, labels)
    torch.testing.assert_close(hf.sequence_logps(twin, input_ids, labels, mask), expected, **CLOSE)
    saved = io.BytesIO()
    torch.save(twin, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    torch.testing.assert_close(
        hf.sequence_logps(loaded, input_ids, labels, mask), expected, **CLOSE
    )
