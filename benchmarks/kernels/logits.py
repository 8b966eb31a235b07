"""logits_logps and its backward, and logits to the loss, beside what PyTorch makes of them: eager,
and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.inputs import capped
from benchmarks.kernels import traffic
from benchmarks.kernels.comparison import COPY, Comparison, Shape, copy_of, serving, sets
from benchmarks.measure import Step
from benchmarks.providers.base import no_compiler
from benchmarks.scenarios import HEADS
from fastdpo.backends import select
from fastdpo.backends.contract import LogitMap

_SEQUENCES = 8
Function = Callable[[Tensor, Tensor, float | None], Tensor]


def comparisons(shape: Shape, device: torch.device) -> Iterator[Comparison]:
    torch.compiler.reset()  # its limit of recompilations is per function, and shapes are many
    _, vocab, softcap = HEADS[shape.head]
    count = sets(shape.rows * vocab * shape.dtype.itemsize)
    logits = [
        torch.empty(shape.rows, vocab, device=device, dtype=shape.dtype).normal_()
        for _ in range(count)
    ]
    labels = torch.randint(vocab, (shape.rows,), device=device)
    yield _forward(shape, logits, labels, softcap)
    yield _backward(shape, logits, labels, softcap)
    yield _loss(shape, logits, labels, softcap)


def _forward(
    shape: Shape, logits: list[Tensor], labels: Tensor, softcap: float | None
) -> Comparison:
    first, count = logits[0], len(logits)
    logit_map = LogitMap(softcap=softcap)
    found, absent = serving("logits_logps", first)
    work = traffic.logits_logps(*first.shape, first.element_size())
    steps: dict[str, Step] = {
        name: lambda i, m=module: m.logits_logps(logits[i % count], labels, logit_map)
        for name, module in found.items()
    }
    if "cuda" in found:  # a row's parts put together by a launch instead of by its last block
        steps["cuda, second launch"] = lambda i: found["cuda"].logits_logps(
            logits[i % count], labels, logit_map, second_launch=True
        )
    for name, function in _pytorch(first.device, absent).items():
        steps[name] = lambda i, f=function: f(logits[i % count], labels, softcap)
    floor = copy_of(work.bytes, first.device)
    return Comparison("logits_logps", shape.as_dict(), work, COPY, floor, steps, absent)


def _backward(
    shape: Shape, logits: list[Tensor], labels: Tensor, softcap: float | None
) -> Comparison:
    first, count = logits[0], len(logits)
    logit_map = LogitMap(softcap=softcap)
    # By the torch backend, so that a forward that fails does not take this comparison with it.
    oracle = select.primitive("logits_logps", first, "torch")
    lse = [oracle.logits_logps(z, labels, logit_map)[1] for z in logits]
    grad, out = lse[0].new_ones(labels.shape), [torch.empty_like(z) for z in logits]
    found, absent = serving("logits_logps_backward", first)
    work = traffic.logits_logps_backward(*first.shape, first.element_size())

    def step(module: ModuleType) -> Step:
        def run(i: int) -> None:
            j = i % count
            module.logits_logps_backward(grad, logits[j], labels, lse[j], logit_map, out[j])

        return run

    steps = {name: step(module) for name, module in found.items()}
    for name, function in _pytorch(first.device, absent).items():
        steps[name] = _Graphs(function, logits, labels, softcap, grad)
    floor = copy_of(work.bytes, first.device)
    return Comparison("logits_logps_backward", shape.as_dict(), work, COPY, floor, steps, absent)


def _loss(shape: Shape, logits: list[Tensor], labels: Tensor, softcap: float | None) -> Comparison:
    """The forward to the DPO sigmoid loss of pairs: as one sequence of launches where there is one,
    and primitive by primitive.
    """
    first, count, rows = logits[0], len(logits), labels.numel()
    logit_map = LogitMap(softcap=softcap)
    sequences = min(_SEQUENCES, rows // 2 * 2)
    ends = [rows * s // sequences for s in range(sequences + 1)]
    offsets = torch.tensor(ends, device=first.device)
    lengths = offsets.diff()
    ref = torch.zeros(sequences, device=first.device)
    options = (0.1, 0.0, False, "concatenated")
    found, absent = serving("logits_logps", first)
    losses, _ = serving("sequence_loss", first.new_empty(0, dtype=torch.float32))
    work = traffic.logits_logps(*first.shape, first.element_size())

    def by_primitives(name: str) -> Step:
        def run(i: int) -> None:
            logps, _ = found[name].logits_logps(logits[i % count], labels, logit_map)
            losses[name].sequence_loss(logps, offsets, ref, *options)

        return run

    def fused(module: ModuleType) -> Step:
        return lambda i: module.logits_sequence_loss(
            logits[i % count], labels, logit_map, offsets, ref, *options
        )

    steps = {name: by_primitives(name) for name in found if name in losses}
    for name, module in found.items():
        if hasattr(module, "logits_sequence_loss"):
            steps[f"{name}, fused"] = fused(module)
    for name, function in _pytorch(first.device, absent).items():

        def run(i: int, function: Function = function) -> Tensor:
            logps = function(logits[i % count], labels, softcap)
            sums = torch.segment_reduce(logps, "sum", lengths=lengths, unsafe=True)
            margins = 0.1 * (sums - ref).view(2, -1).diff(dim=0)
            return -torch.nn.functional.logsigmoid(-margins).mean()

        steps[name] = run
    floor = copy_of(work.bytes, first.device)
    return Comparison("logits_sequence_loss", shape.as_dict(), work, COPY, floor, steps, absent)


class _Graphs:
    """The backward alone, of graphs whose forwards ran once, on the first call."""

    def __init__(
        self,
        function: Function,
        logits: list[Tensor],  # [N, V] each
        labels: Tensor,  # [N]
        softcap: float | None,
        grad: Tensor,  # [N]
    ):
        self._arguments = function, logits, labels, softcap
        self._grad = grad
        self._graphs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, i: int) -> Tensor:
        if not self._graphs:
            function, logits, labels, softcap = self._arguments
            leaves = [z.detach().requires_grad_() for z in logits]
            self._graphs = [(function(leaf, labels, softcap), leaf) for leaf in leaves]
        logps, leaf = self._graphs[i % len(self._graphs)]
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
