"""What the autograd functions share: gradients that can be taken once; whether a graph will be
needed again; and operators in the place of code that a tracer cannot follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NO_SECOND_DERIVATIVE = (
    "fastdpo: the gradient of a loss cannot be differentiated again; take it without "
    "create_graph=True (a gradient penalty, a Hessian and torch.autograd.functional's hessian, "
    "hvp, vhp and jvp need the logits of eager PyTorch)"
)
NO_BATCHED_GRADIENTS = (
    "fastdpo: this gradient cannot be taken for several upstream gradients at once; call without "
    "is_grads_batched=True (torch.autograd.functional: vectorize=False)"
)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd.Function, under `staticmethod`: refuses to be part of a
    graph that could be differentiated again.

    Refused at once, and not when that happens: a node that waits for the second differentiation is
    reached only by paths that PyTorch knows of, and a backward restricted to some inputs would go
    round it to a wrong number. PyTorch's own decorator refuses only where the incoming gradient
    asks to be differentiated: that of a loss is the constant 1.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                raise RuntimeError(NO_SECOND_DERIVATIVE)
            if any(grad is not None and is_batched(grad) for grad in grads):
                raise RuntimeError(NO_BATCHED_GRADIENTS)
        return backward(ctx, *grads)

    return wrapped


def is_batched(grad: Tensor) -> bool:
    """Whether vmap hides a batch in it, old (`is_grads_batched`) or new (torch.func)."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def graph_is_kept() -> bool:
    """Inside a backward: whether the graph can be gone through again (True where PyTorch does not
    tell).
    """
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or bool(tell())


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether the call is being recorded, or its tensors have shapes and no data (the meta device,
    FakeTensorMode): nothing may then depend on values, and operators stand for the code that does.
    """
    if torch.compiler.is_compiling():
        return True
    return any(t is not None and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors)
