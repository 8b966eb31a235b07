"""A head whose weight is a quantized tensor in the place of a parameter, as torchao makes them.

Where only the weight is quantized, the model multiplies what `dequantize` gives, and that is a head
like any other, frozen. Where the activations are rounded too, the logits are no linear function of
the hidden states, and the head is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .unwrap import UnsupportedModel


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
