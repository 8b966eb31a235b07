"""A head whose weight is quantized: what it multiplies, once per call.

torchao puts a quantized tensor in the place of a parameter. Where only the weight is quantized, the
model multiplies what `dequantize` gives, and that is a head like any other, frozen. Where torchao
rounds the activations too, the head is refused.

bitsandbytes has layers of its own. Linear4bit multiplies Ŵ, the dequantized weight, in its compute
dtype. Linear8bitLt rounds the activations too (LLM.int8(), arXiv 2208.07339), row by row, but for
the columns in which a value of the batch reaches `threshold`:

    z_tv = Σ_j∉O q_tj Q_vj · (a_t / 127) (b_v / 127) + Σ_j∈O x_tj Ŵ_vj      Ŵ_vj = Q_vj b_v / 127

with integers q and Q, a and b the rows' largest sizes. The scales leave the sum, so that

    z = x̂ · Ŵᵀ       x̂_tj = q_tj a_t / 127 for j ∉ O, x_tj for j ∈ O

is the very same number before rounding: a product with rounded hidden states, whose gradient
bitsandbytes passes on as if nothing had been rounded (∂loss/∂x = ∂loss/∂z · Ŵ). On a CPU in
training mode Linear8bitLt multiplies x itself.

Ŵ is made whole: the memory of an unquantized head, in the dtype of the product, while the head is
called, and up to the backward where an adapter on the head is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .unwrap import UnsupportedModel

LAYERS = ("Linear4bit", "Linear8bitLt")  # bitsandbytes'
_PLAIN_8_BIT = ("cpu", "xpu")  # where Linear8bitLt trains without rounding activations


def dequantized(
    weight: Tensor,  # [V, D] readable
) -> Tensor:  # [V, D], a copy without gradient; the weight itself where it is not quantized
    if not is_traceable_wrapper_subclass(weight):
        return weight
    with torch.no_grad():
        return weight.dequantize()


def check_readable(
    weight: Tensor,  # [V, D]
) -> None:
    """
    Raises:
        UnsupportedModel: it is of a dtype or a kind of tensor that cannot be read, it quantizes
            activations too, or it is quantized and trained.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UnsupportedModel(
            f"model: the lm_head's weight is quantized ({weight.dtype}); keep the head unquantized"
        )
    if not is_traceable_wrapper_subclass(weight):
        return
    kind: Any = type(weight)
    name = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
    if kind.dequantize is Tensor.dequantize:
        raise UnsupportedModel(
            f"model: the lm_head's weight is {name}, a tensor that fastdpo cannot read (it has no "
            "dequantize of its own); keep the head a plain tensor"
        )
    rounding = [key for key, value in vars(weight).items() if _rounds_activations(key, value)]
    if rounding:
        raise UnsupportedModel(
            f"model: the lm_head's weight is {name}, which quantizes the hidden states too "
            f"({', '.join(rounding)}): its logits are no linear function of them; quantize the "
            "head's weight only, or leave the head unquantized"
        )
    if weight.requires_grad:
        raise UnsupportedModel(
            f"model: the lm_head's weight is {name} and requires a gradient; fastdpo reads "
            "quantized heads that are frozen"
        )


def _rounds_activations(name: str, value: object) -> bool:
    """torchao's names for it: act_quant_kwargs, act_pre_scale, activation_quantization, ..."""
    if isinstance(value, torch.dtype):
        return name.startswith("act") and value.itemsize < 2
    return name.startswith("act") and value is not None


# ---- bitsandbytes


def of_bitsandbytes(module: Any) -> str | None:
    """Which of its layers' forward it has. By name: the package takes seconds to import."""
    for cls in type(module).__mro__:
        if cls.__name__ in LAYERS and cls.__module__.startswith("bitsandbytes."):
            return cls.__name__
        if "forward" in vars(cls):
            return None
    return None


def check_layer(layer: Any) -> None:
    """
    Raises:
        UnsupportedModel: a layer of bitsandbytes that is not quantized, or in a way that cannot be
            read.
    """
    kind = of_bitsandbytes(layer)
    what = f"model: its output head is bitsandbytes' {kind}"
    keep = 'keep the head unquantized, with llm_int8_skip_modules=["lm_head"]'
    if kind == "Linear8bitLt":
        if layer.state.has_fp16_weights:
            raise UnsupportedModel(
                f"{what} with has_fp16_weights=True, whose weight is trained and rounded anew in "
                f"each forward; {keep}, or has_fp16_weights=False for a frozen one"
            )
        if _codes(layer)[1] is None:
            raise UnsupportedModel(f"{what}, not quantized yet: move it to its device first")
        return
    state = _quant_state(layer)
    if state is None:
        raise UnsupportedModel(f"{what}, not quantized yet: move it to its device first")
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        raise UnsupportedModel(
            f"{what} with a weight that was quantized as {list(state.shape)} instead of [V, D]; "
            "quantize it again"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedModel(
            f"{what}, which this CPU has packed anew for inference (AVX512-BF16): load the model "
            "again, and set support_avx512bf16_for_cpu=False on that layer before its first call"
        )


def dequantized_layer(
    layer: Any,  # checked
    hidden: Tensor,  # [..., D] what it is called with
) -> tuple[Tensor, Tensor]:  # x̂ [..., D], Ŵ [V, D]
    """What the layer multiplies, in one dtype: x̂ differentiable as if it were hidden."""
    if of_bitsandbytes(layer) == "Linear4bit":
        dtype = _compute_dtype(layer, hidden.dtype)
        return hidden.to(dtype), _weight_4_bit(layer).to(dtype)
    codes, sizes = _codes(layer)
    with torch.no_grad():
        # As bitsandbytes' own backward makes it.
        weight = codes.to(hidden.dtype, copy=True).mul_(sizes.unsqueeze(1).mul(1.0 / 127.0))
    if layer.training and hidden.device.type in _PLAIN_8_BIT:
        return hidden, weight
    return _Rounded.apply(hidden, float(layer.state.threshold)), weight


def layer_weight(layer: Any) -> Tensor:  # [V, D]
    """Ŵ, where nothing is multiplied: in the dtype that was quantized, for 8 bits in fp32."""
    if of_bitsandbytes(layer) == "Linear4bit":
        return _weight_4_bit(layer)
    codes, sizes = _codes(layer)
    return codes.float().mul_(sizes.unsqueeze(1).mul(1.0 / 127.0))


def rounds_hidden(layer: Any) -> bool:
    return of_bitsandbytes(layer) == "Linear8bitLt"


def _weight_4_bit(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad():
        return dequantize_4bit(layer.weight.data.view(-1, 1), _quant_state(layer))


def _quant_state(layer: Any) -> Any:
    found = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if found is None else found


def _compute_dtype(layer: Any, dtype: torch.dtype) -> torch.dtype:
    """Of the product; the layer's first call settles it."""
    if not layer.compute_type_is_set and dtype in (torch.float32, torch.bfloat16):
        return dtype
    return dtype if layer.compute_dtype is None else layer.compute_dtype


def _codes(layer: Any) -> tuple[Any, Any]:  # Q [V, D] int8, b [V]
    """Of the layer's state, or until its first call of its weight."""
    state, weight = layer.state, layer.weight
    codes = getattr(weight, "CB", None) if state.CB is None else state.CB
    sizes = getattr(weight, "SCB", None) if state.SCB is None else state.SCB
    return (weight.data if codes is None else codes), sizes


class _Rounded(torch.autograd.Function):
    """x̂, by bitsandbytes' own rounding of fp16."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, threshold: float) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        flat = hidden.reshape(-1, hidden.shape[-1])
        if flat.shape[0] == 0:
            return hidden.clone()
        # It sets what it leaves out to 0.
        codes, sizes, outside = int8_vectorwise_quant(flat.half().clone(), threshold=threshold)
        rounded = codes.to(torch.float32).mul_(sizes.unsqueeze(1).mul(1.0 / 127.0))
        rounded = rounded.to(hidden.dtype)
        if threshold > 0.0 and outside is not None and outside.numel():
            rounded[:, outside] = flat[:, outside]
        return rounded.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
