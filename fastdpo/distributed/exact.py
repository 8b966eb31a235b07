"""Numbers that leave a module through wrappers which may round them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Exact:
    """A number that leaves through wrappers, and what became of it.

    Wrappers may round what leaves a model (FSDP2's `output_dtype`, as accelerate sets it). The
    rounded tensor then only carries the order of their hooks: the exact value goes beside it, and
    so does the gradient that comes back.
    """

    def __init__(self, value: Tensor):
        self.value = value.detach()
        self.grad: Tensor | None = None

    def depart(self, value: Tensor) -> Tensor:
        """A tensor of its own: hooks that hang on a view are lost where it is written to."""
        return _Depart.apply(value, self)

    def arrive(self, value: Tensor) -> Tensor:
        if value.dtype == self.value.dtype:
            return value
        return _Arrive.apply(value, self) if value.requires_grad else self.value


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, exact: Exact) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.exact = exact
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        exact, ctx.exact.grad = ctx.exact.grad, None
        return grad if exact is None else exact, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, exact: Exact) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.exact, ctx.dtype = exact, value.dtype
        return exact.value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.exact.grad = grad
        return None if grad is None else grad.to(ctx.dtype), None
