"""The primitives to time, of every backend that serves them, beside what bounds them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.kernels import logits as logits_kernels
from benchmarks.kernels import traffic
from benchmarks.kernels.comparison import COPY, ROTATE, Comparison, Shape, copy_of, serving
from benchmarks.measure import Step
from benchmarks.scenarios import HEADS
from fastdpo.backends import select
from fastdpo.backends.contract import Head
from fastdpo.backends.workspace import padded_empty

_SEQUENCES = 16


def comparisons(shape: Shape, device: torch.device) -> Iterator[Comparison]:
    """Every primitive on this shape; what one holds in memory is gone before the next."""
    yield from _products(shape, device, store=False)
    yield from _products(shape, device, store=True)
    yield from _targets(shape, device)
    yield from logits_kernels.comparisons(shape, device)
    yield from _sequences(shape, device)


def _inputs(shape: Shape, device: torch.device) -> tuple[list[Tensor], Head, Tensor]:
    d, vocab, softcap = HEADS[shape.head]
    hidden = [torch.randn(shape.rows, d, device=device).to(shape.dtype) for _ in range(ROTATE)]
    weight = (torch.randn(vocab, d, device=device) * d**-0.5).to(shape.dtype)
    labels = torch.randint(vocab, (shape.rows,), device=device)
    return hidden, Head(weight, softcap=softcap), labels


def _products(shape: Shape, device: torch.device, store: bool) -> Iterator[Comparison]:
    hidden, head, labels = _inputs(shape, device)
    found, absent = serving("exp_logits", hidden[0])
    # By the torch backend, so that a kernel that fails takes no other comparison with it.
    oracle = select.primitive("target_logits", hidden[0], "torch")
    anchors = [oracle.target_logits(x, head, labels) for x in hidden]
    kept = padded_empty(shape.rows, head.vocab_size, hidden[0])
    out = kept if store else None

    def step(module: ModuleType) -> Step:
        def run(i: int) -> object:
            x, anchor = hidden[i % ROTATE], anchors[i % ROTATE]
            return module.exp_logits(x, head, labels, anchor, out=out)

        return run

    vocab, d = head.weight.shape
    precision = torch.backends.cuda.matmul.fp32_precision
    kind = "half" if shape.dtype.itemsize == 2 else "tf32" if precision == "tf32" else "ieee"
    yield Comparison(
        "exp_logits with E" if store else "exp_logits",
        shape.as_dict(),
        traffic.exp_logits(
            shape.rows,
            vocab,
            d,
            shape.dtype.itemsize,
            kind,
            vocab if store else 0,
            softcap=head.softcap is not None,
        ),
        "the vendor's product",
        lambda i: torch.mm(hidden[i % ROTATE], head.weight.t(), out=kept),
        {name: step(module) for name, module in found.items()},
        absent,
    )


def _targets(shape: Shape, device: torch.device) -> Iterator[Comparison]:
    hidden, head, labels = _inputs(shape, device)
    found, absent = serving("target_logits", hidden[0])
    work = traffic.target_logits(shape.rows, hidden[0].shape[1], shape.dtype.itemsize)
    yield Comparison(
        "target_logits",
        shape.as_dict(),
        work,
        COPY,
        copy_of(work.bytes, device),
        {
            name: lambda i, m=module: m.target_logits(hidden[i % ROTATE], head, labels)
            for name, module in found.items()
        },
        absent,
    )


def _sequences(shape: Shape, device: torch.device) -> Iterator[Comparison]:
    logps = -torch.rand(shape.rows, device=device)
    offsets = torch.linspace(0, shape.rows, _SEQUENCES + 1, device=device).long()
    ref = -torch.rand(_SEQUENCES, device=device)
    found, absent = serving("sequence_loss", logps)
    work = traffic.sequence_loss(shape.rows, _SEQUENCES)
    arguments = (logps, offsets, ref, 0.1, 0.0, False, "concatenated")
    yield Comparison(
        "sequence_loss",
        shape.as_dict() | {"dtype": "float32", "sequences": _SEQUENCES},
        work,
        COPY,
        copy_of(work.bytes, device),
        {name: lambda i, m=module: m.sequence_loss(*arguments) for name, module in found.items()},
        absent,
    )
