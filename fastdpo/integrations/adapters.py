"""What PEFT puts on an output head: LoRA, DoRA, and single rows that are trained.

LoRA adds columns, see `fastdpo.integrations.heads`. DoRA scales the rows of what LoRA makes,

    z = h · (c ∘ W)ᵀ + p · (c ∘ B)ᵀ + bias        c = m / ‖W + s B A‖, of each row [V]

with m trained, and c's denominator a constant for the gradient (arXiv 2402.09353, section 4.3).
Where its dropout is active PEFT drops in the base's product as well, but not in the one that c = 1
stands for: z = h · Wᵀ + drop(h) · ((c − 1) ∘ W)ᵀ + p · (c ∘ B)ᵀ + bias, whose columns are twice as
many. c ∘ W is a weight of its own: its gradient is of its size.

Rows that are trained (trainable_token_indices) replace those of the weight: a copy, with a gradient
of its size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.contract import Head
from .unwrap import UnsupportedModel

_BLOCK = 1 << 24  # elements of W + s B A at a time


class Adapter(NamedTuple):
    layer: Any  # PEFT's, that has it
    lora_a: nn.Linear
    lora_b: nn.Linear
    scaling: float
    dropout: nn.Module
    magnitude: Any | None  # DoRA's

    def columns(
        self,
        hidden: Tensor,  # [..., D]
        head: Head,
        with_dropout: bool,
    ) -> tuple[list[Tensor], list[Tensor], Head]:  # [..., r] each, [V, r] each
        """What it adds to hidden, to the head's weight and to the head."""
        taken = hidden.to(self.lora_a.weight.dtype)
        dropped = self.dropout(taken) if with_dropout else taken
        b = self.lora_b.weight
        head = dataclasses.replace(head, bias=self.bias_of(head))
        if self.magnitude is None:
            return [self.lora_a(dropped) * self.scaling], [b], head
        scale = self.row_scale(head.weight).unsqueeze(1)  # [V, 1]
        if self.layer.training and not isinstance(self.dropout, nn.Identity):
            p = self.lora_a(dropped) * self.scaling
            return [dropped, p], [(scale - 1.0) * head.weight, scale * b], head
        weight = (scale * head.weight).to(head.weight.dtype)
        p = self.lora_a(taken) * self.scaling
        return [p], [scale * b], dataclasses.replace(head, weight=weight)

    def row_scale(self, weight: Tensor) -> Tensor:  # [V, D] -> [V]
        """c of DoRA, differentiable in m."""
        assert self.magnitude is not None
        a, b = self.lora_a.weight, self.lora_b.weight
        with torch.no_grad():
            rows = max(1, _BLOCK // weight.shape[1])
            norms = [
                torch.linalg.norm(w.to(a.dtype) + self.scaling * torch.mm(b_rows, a), dim=1)
                for w, b_rows in zip(weight.split(rows), b.split(rows), strict=True)
            ]
        return self.magnitude.weight / torch.cat(norms)

    def bias_of(self, head: Head) -> Tensor | None:  # [V]
        """The head's and its own."""
        if self.lora_b.bias is None:
            return head.bias
        own = (self.lora_b.bias * self.scaling).to(head.weight.dtype)
        return own if head.bias is None else head.bias + own


def is_of(package: str, module: Any) -> bool:
    # fully_shard puts a class of its own before the module's.
    return any(f"{cls.__module__}.".startswith(f"{package}.") for cls in type(module).__mro__)


def is_lora(module: Any) -> bool:
    """On a linear layer, quantized or not."""
    if not is_of("peft", module):
        return False
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import LoraLayer

    quantized = isinstance(module, LoraLayer) and is_of("peft.tuners.lora.bnb", module)
    return isinstance(module, LoraLinear) or quantized


def adapters_of(module: Any) -> Iterator[Adapter]:
    """Every active LoRA adapter of a layer, disabled or not.

    Raises:
        UnsupportedModel: a variant of LoRA that fastdpo does not know, or DoRA beside others.
    """
    if not is_lora(module) or module.merged:
        return
    active = [name for name in module.active_adapters if name in module.lora_A]
    for name in active:
        variant = module.lora_variant.get(name)
        kind = type(variant).__name__
        if variant is not None and kind != "DoraLinearVariant":
            raise UnsupportedModel(
                f"model: adapter {name!r} puts a LoRA variant that fastdpo does not know on the "
                f"output head ({kind}); plain LoRA and DoRA are supported there"
            )
        if variant is not None and len(active) > 1:
            raise UnsupportedModel(
                f"model: adapter {name!r} is DoRA and one of several active ones on the output "
                f"head ({active}); DoRA is supported there alone"
            )
        yield Adapter(
            module,
            module.lora_A[name],
            module.lora_B[name],
            module.scaling[name],
            module.lora_dropout[name],
            None if variant is None else module.lora_magnitude_vector[name],
        )


def trains_rows(module: Any) -> bool:
    """Is it PEFT's layer with rows that are trained (not the wrapper around it)?"""
    if not is_of("peft", module):
        return False
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return isinstance(module, TrainableTokensLayer)


def active(module: Any) -> nn.Module | None:
    """What one of PEFT's wrappers calls; None where it is none of those that are known."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter
    if not isinstance(module, ModulesToSaveWrapper):
        return None
    names = module.active_adapters
    if module.disable_adapters or not names or any(n not in module._adapters for n in names):
        return module.original_module
    return module.modules_to_save[names[0]]


def with_trained_rows(
    module: Any,  # of `trains_rows`
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as PEFT's forward has them: without a bias, where rows are replaced."""
    names = module.active_adapters
    if module.disable_adapters or not names or module.merged:
        return weight, bias
    module._check_overlapping_tokens(names)
    return module.get_merged_weights(names), None
