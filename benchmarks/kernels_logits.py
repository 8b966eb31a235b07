"""logits_logps and its backward, beside what PyTorch makes of them: eager, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import kernels_model
from benchmarks.inputs import capped
from benchmarks.kernels_contest import COPY, Contest, Shape, copy_of, serving
from benchmarks.measure import Step
from benchmarks.providers.base import no_compiler
from benchmarks.scenarios import HEADS
from fastdpo.backends import select
from fastdpo.head import Head

Function = Callable[[Tensor, Tensor, float | None], Tensor]


def contests(shape: Shape, device: torch.device) -> Iterator[Contest]:
    _, vocab, softcap = HEADS[shape.head]
    # More than any L2 for every shape here, so that one set of logits is enough.
    logits = torch.empty(shape.rows, vocab, device=device, dtype=shape.dtype).normal_()
    labels = torch.randint(vocab, (shape.rows,), device=device)
    grad = torch.ones(shape.rows, device=device)
    yield _forward(shape, logits, labels, softcap)
    yield _backward(shape, logits, labels, grad, softcap)


def _forward(shape: Shape, logits: Tensor, labels: Tensor, softcap: float | None) -> Contest:
    head = Head(logits.new_empty(0), softcap=softcap)
    found, absent = serving("logits_logps", logits)
    work = kernels_model.logits_logps(*logits.shape, logits.element_size())
    steps: dict[str, Step] = {
        name: lambda i, m=module: m.logits_logps(logits, labels, head)
        for name, module in found.items()
    }
    for name, function in _pytorch(logits.device, absent).items():
        steps[name] = lambda i, f=function: f(logits, labels, softcap)
    floor = copy_of(work.bytes, logits.device)
    return Contest("logits_logps", shape.as_dict(), work, COPY, floor, steps, absent)


def _backward(
    shape: Shape, logits: Tensor, labels: Tensor, grad: Tensor, softcap: float | None
) -> Contest:
    head = Head(logits.new_empty(0), softcap=softcap)
    _, lse = select.primitive("logits_logps", logits).logits_logps(logits, labels, head)
    out = torch.empty_like(logits)
    found, absent = serving("logits_logps_backward", logits)
    work = kernels_model.logits_logps_backward(*logits.shape, logits.element_size())
    steps: dict[str, Step] = {
        name: lambda i, m=module: m.logits_logps_backward(grad, logits, labels, lse, head, out)
        for name, module in found.items()
    }
    for name, function in _pytorch(logits.device, absent).items():
        steps[name] = _Graph(function, logits, labels, softcap, grad)
    floor = copy_of(work.bytes, logits.device)
    return Contest("logits_logps_backward", shape.as_dict(), work, COPY, floor, steps, absent)


class _Graph:
    """The backward alone of a graph whose forward ran once, on the first call."""

    def __init__(
        self,
        function: Function,
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N]
        softcap: float | None,
        grad: Tensor,  # [N]
    ):
        self._arguments = function, logits, labels, softcap
        self._grad = grad
        self._graph: tuple[Tensor, Tensor] | None = None

    def __call__(self, i: int) -> Tensor:
        if self._graph is None:
            function, logits, labels, softcap = self._arguments
            leaf = logits.detach().requires_grad_()
            self._graph = function(leaf, labels, softcap), leaf
        logps, leaf = self._graph
        return torch.autograd.grad(logps, leaf, self._grad, retain_graph=True)[0]


def _pytorch(device: torch.device, absent: dict[str, str]) -> dict[str, Function]:
    found: dict[str, Function] = {"eager": _logps}
    reason = no_compiler(device)
    if reason is None:
        found["compiled"] = torch.compile(_logps, dynamic=False)
    else:
        absent["compiled"] = reason
    return found


def _logps(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    softcap: float | None,
) -> Tensor:  # [N]
    """As trainers write it: logits to fp32, log_softmax, gather."""
    z = capped(logits.float(), softcap)
    return z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
