"""The primitives to time, of every backend that serves them, beside what bounds them.

A product is held against the vendor's product of the same shape, everything else against a device
copy that moves as many bytes. Inputs rotate, so that a cache that held the last call's does not
help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernels_model
from benchmarks.kernels_model import Work
from benchmarks.measure import Step
from benchmarks.scenarios import HEADS
from fastdpo.backends import select
from fastdpo.backends.select import BackendUnavailable
from fastdpo.head import Head
from fastdpo.workspace import padded_empty

_ROTATE = 2
_SEQUENCES = 16


@dataclass
class Contest:
    """One primitive on one shape: its floor, and those that are held against it."""

    name: str
    shape: dict[str, Any]
    work: Work
    floor_is: str
    floor: Step
    steps: dict[str, Step]  # by backend
    absent: dict[str, str]  # backend -> why


@dataclass(frozen=True)
class Shape:
    head: str
    rows: int
    dtype: torch.dtype = torch.bfloat16

    def as_dict(self) -> dict[str, Any]:
        d, vocab, softcap = HEADS[self.head]
        name = str(self.dtype).removeprefix("torch.")
        return {"head": self.head, "N": self.rows, "V": vocab, "D": d, "softcap": softcap} | {
            "dtype": name
        }


def contests(shape: Shape, device: torch.device) -> Iterator[Contest]:
    """Every primitive on this shape; what one holds in memory is gone before the next."""
    yield from _products(shape, device, store=False)
    yield from _products(shape, device, store=True)
    yield from _targets(shape, device)
    yield from _materialized(shape, device)
    yield from _sequences(shape, device)


def serving(primitive: str, like: Tensor) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The backends that implement and can run it here, and why the others do not."""
    found: dict[str, ModuleType] = {}
    absent: dict[str, str] = {}
    for name in select.NAMES:
        try:
            module = select.primitive(primitive, like, name)
        except (BackendUnavailable, ImportError) as error:
            absent[name] = str(error)
            continue
        if module.__name__.rpartition(".")[2] == name:
            found[name] = module
        else:
            absent[name] = f"the {name} backend does not implement it"
    return found, absent


def copy_of(size: float, device: torch.device) -> Step:
    """A copy that reads and writes `size` bytes together."""
    half = max(1, int(size) // 2)
    source = torch.empty(_ROTATE, half, dtype=torch.uint8, device=device)
    target = torch.empty(half, dtype=torch.uint8, device=device)
    return lambda i: target.copy_(source[i % _ROTATE])


def _inputs(shape: Shape, device: torch.device) -> tuple[list[Tensor], Head, Tensor]:
    d, vocab, softcap = HEADS[shape.head]
    hidden = [torch.randn(shape.rows, d, device=device).to(shape.dtype) for _ in range(_ROTATE)]
    weight = (torch.randn(vocab, d, device=device) * d**-0.5).to(shape.dtype)
    labels = torch.randint(vocab, (shape.rows,), device=device)
    return hidden, Head(weight, softcap=softcap), labels


def _products(shape: Shape, device: torch.device, store: bool) -> Iterator[Contest]:
    hidden, head, labels = _inputs(shape, device)
    found, absent = serving("exp_logits", hidden[0])
    anchors = [select.primitive("target_logits", x).target_logits(x, head, labels) for x in hidden]
    kept = padded_empty(shape.rows, head.vocab_size, hidden[0])
    out = kept if store else None

    def step(module: ModuleType) -> Step:
        def run(i: int) -> object:
            x, anchor = hidden[i % _ROTATE], anchors[i % _ROTATE]
            return module.exp_logits(x, head, labels, anchor, out=out)

        return run

    vocab, d = head.weight.shape
    precision = torch.backends.cuda.matmul.fp32_precision
    kind = "half" if shape.dtype.itemsize == 2 else "tf32" if precision == "tf32" else "ieee"
    yield Contest(
        "exp_logits with E" if store else "exp_logits",
        shape.as_dict(),
        kernels_model.exp_logits(
            shape.rows, vocab, d, shape.dtype.itemsize, kind, vocab if store else 0
        ),
        "the vendor's product",
        lambda i: torch.mm(hidden[i % _ROTATE], head.weight.t(), out=kept),
        {name: step(module) for name, module in found.items()},
        absent,
    )


def _targets(shape: Shape, device: torch.device) -> Iterator[Contest]:
    hidden, head, labels = _inputs(shape, device)
    found, absent = serving("target_logits", hidden[0])
    work = kernels_model.target_logits(shape.rows, hidden[0].shape[1], shape.dtype.itemsize)
    yield Contest(
        "target_logits",
        shape.as_dict(),
        work,
        "a copy of as many bytes",
        copy_of(work.bytes, device),
        {
            name: lambda i, m=module: m.target_logits(hidden[i % _ROTATE], head, labels)
            for name, module in found.items()
        },
        absent,
    )


def _materialized(shape: Shape, device: torch.device) -> Iterator[Contest]:
    _, vocab, softcap = HEADS[shape.head]
    # More than any L2 for every shape here, so that one set of logits is enough.
    logits = torch.empty(shape.rows, vocab, device=device, dtype=shape.dtype).normal_()
    labels = torch.randint(vocab, (shape.rows,), device=device)
    head = Head(logits.new_empty(0), softcap=softcap)
    found, absent = serving("logits_logps", logits)
    work = kernels_model.logits_logps(shape.rows, vocab, shape.dtype.itemsize)
    yield Contest(
        "logits_logps",
        shape.as_dict(),
        work,
        "a copy of as many bytes",
        copy_of(work.bytes, device),
        {
            name: lambda i, m=module: m.logits_logps(logits, labels, head)
            for name, module in found.items()
        },
        absent,
    )
    _, lse = select.primitive("logits_logps", logits).logits_logps(logits, labels, head)
    grad, out = torch.ones(shape.rows, device=device), torch.empty_like(logits)
    found, absent = serving("logits_logps_backward", logits)
    work = kernels_model.logits_logps_backward(shape.rows, vocab, shape.dtype.itemsize)
    yield Contest(
        "logits_logps_backward",
        shape.as_dict(),
        work,
        "a copy of as many bytes",
        copy_of(work.bytes, device),
        {
            name: lambda i, m=module: m.logits_logps_backward(grad, logits, labels, lse, head, out)
            for name, module in found.items()
        },
        absent,
    )


def _sequences(shape: Shape, device: torch.device) -> Iterator[Contest]:
    logps = -torch.rand(shape.rows, device=device)
    offsets = torch.linspace(0, shape.rows, _SEQUENCES + 1, device=device).long()
    ref = -torch.rand(_SEQUENCES, device=device)
    found, absent = serving("sequence_loss", logps)
    work = kernels_model.sequence_loss(shape.rows, _SEQUENCES)
    arguments = (logps, offsets, ref, 0.1, 0.0, False, "concatenated")
    yield Contest(
        "sequence_loss",
        shape.as_dict() | {"dtype": "float32", "sequences": _SEQUENCES},
        work,
        "a copy of as many bytes",
        copy_of(work.bytes, device),
        {name: lambda i, m=module: m.sequence_loss(*arguments) for name, module in found.items()},
        absent,
    )
