"""What the autograd functions share: gradients that can be taken once, where a second
differentiation is refused and never silently zero; and whether a graph will be needed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

NO_SECOND_DERIVATIVE = (
    "fastdpo: the gradient of a loss cannot be differentiated again (create_graph=True with a "
    "gradient penalty, torch.autograd.functional.hessian)"
)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd.Function, under `staticmethod`.

    PyTorch's own decorator refuses only where the incoming gradient asks to be differentiated: that
    of a loss is the constant 1, and a gradient penalty on it would be nothing.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        found = found if isinstance(found, tuple) else (found,)
        return tuple(None if g is None else _Refuse.apply(g, _asks(g)) for g in found)

    return wrapped


def _asks(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, device=like.device, requires_grad=True)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def graph_is_kept() -> bool:
    """Inside a backward: whether the graph can be gone through again (True where PyTorch does not
    tell).
    """
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or bool(tell())
