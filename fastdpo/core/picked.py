"""Rows of hidden states, of which some may be picked several times: the last token of a prompt
predicts the first token of every answer to it.

The gradient of such a row is a sum, always in the same order and without floating-point atomics, so
that two runs agree to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..names import NAMESPACE, ops


@torch.library.custom_op(f"{NAMESPACE}::put_back", mutates_args=())
def _put_back(
    grad: Tensor,  # [N, D]
    index: Tensor,  # [N]
    count: int,  # M
) -> Tensor:  # [M, D]
    zeros = grad.new_zeros(count, grad.shape[1])
    if grad.is_cpu:
        return zeros.index_add_(0, index, grad)
    # Sorted by index; on a GPU index_add_ would add atomically.
    return zeros.index_put_((index,), grad, accumulate=True)


@_put_back.register_fake
def _(grad: Tensor, index: Tensor, count: int) -> Tensor:
    return grad.new_empty(count, grad.shape[1])


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, index: Tensor) -> Tensor:
        return hidden.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        hidden, index = inputs
        ctx.save_for_backward(index)
        ctx.count = hidden.shape[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return ops.put_back(grads[0].contiguous(), index, ctx.count), None


def picked(
    hidden: Tensor,  # [M, D]
    index: Tensor,  # [N] int64
) -> Tensor:  # [N, D]
    """The rows of `hidden` at `index`, in its order."""
    return _Picked.apply(hidden, index)
