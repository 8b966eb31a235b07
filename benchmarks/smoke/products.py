"""exp_logits and target_logits, and all that they launch, against the torch backend in fp64."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import synchronize
from benchmarks.smoke.table import Found, Place, check, largest, relative
from fastdpo.backends import torch as oracle
from fastdpo.backends.contract import COLLISION_SHIFT, ExpSums, Head
from fastdpo.backends.workspace import padded_storage, padded_view

_STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_SCALED = {"bias": True, "scale": 1.3, "softcap": 20.0, "temperature": 0.8}
# Of a logit, absolute, and of its exponential, relative.
_ERROR, _TF32_ERROR = 1e-4, 2e-2
_FLAGGED = 3  # row whose label is too unlikely to be an anchor
_FP16_SHIFT = 12.0  # fp16 holds no exponentials from the label's logit on; any anchor will do
_TOLERANCE = 1e-3  # of ties


@dataclass(frozen=True)
class Asked:
    """One way to call exp_logits."""

    dtype: torch.dtype = torch.bfloat16
    rows: int | None = None
    tf32: bool = False
    store: bool = True
    columns: float = 1.0  # share of E's that are stored
    aligned: bool = True
    flagged: bool = False
    stats: tuple[str, ...] = ()
    head: Mapping[str, Any] = field(default_factory=dict)

    @property
    def allowed(self) -> float:
        return _TF32_ERROR if self.tf32 else _ERROR


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D]
    head: Head
    labels: Tensor  # [N]


class Output(NamedTuple):
    sums: ExpSums
    out: Tensor | None  # [N, K]
    beyond: Tensor | None  # [N, ·] what lies between E's rows


def _inputs(place: Place, asked: Asked) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    rows, vocab, depth = asked.rows or place.rows, place.vocab, place.depth
    aside = 0 if asked.aligned else 1  # rows then start at no multiple of 16 bytes

    def matrix(count: int, scale: float) -> Tensor:
        wide = torch.randn(count, depth + aside, generator=generator) * scale
        return wide.to(asked.dtype).to(place.device)[:, aside:]

    hidden, weight = matrix(rows, 1.0), matrix(vocab, 2.0 / depth**0.5)
    options = dict(asked.head)
    bias = None
    if options.pop("bias", False):
        bias = torch.randn(vocab, generator=generator).to(asked.dtype).to(place.device)
    labels = torch.randint(vocab, (rows,), generator=generator).to(place.device)
    if "is_top1" in asked.stats and rows > 2:
        # The first row's label is a largest logit, but not the first of two; the second's is.
        weight[11] = weight[5]
        hidden[:2] = 3.0 * weight[5]
        labels[:2] = torch.tensor([11, 5], device=place.device)
    return Inputs(hidden, Head(weight, bias, **options), labels)


def _wide(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.double()
    return dataclasses.replace(head, weight=head.weight.double(), bias=bias)


def _anchors(triton: ModuleType, inputs: Inputs, asked: Asked) -> Tensor:  # [N]
    anchor = triton.target_logits(*inputs)
    if asked.flagged:
        anchor[min(_FLAGGED, len(anchor) - 1)] = -400.0
    return anchor + _FP16_SHIFT if asked.dtype == torch.float16 else anchor


def _run(module: ModuleType, inputs: Inputs, asked: Asked, anchor: Tensor, **fixed: Any) -> Output:
    """By the kernels, or where the inputs are wide by the oracle."""
    hidden, head, labels = inputs
    out = beyond = None
    if asked.store:
        columns = int(asked.columns * head.vocab_size)
        flat = padded_storage(len(hidden), columns, hidden).fill_(float("nan"))
        out = padded_view(flat, len(hidden), columns)
        beyond = flat.view(len(hidden), -1)[:, columns:]
    options: dict[str, Any] = {"stats": asked.stats, **fixed}
    if "is_top1" in asked.stats:
        options["tolerance"] = torch.full_like(anchor, _TOLERANCE)
    entry = torch.linspace(-1.0, 1.0, len(hidden), device=hidden.device, dtype=anchor.dtype)
    sums = module.exp_logits(
        hidden, head, labels, anchor, out=out, label_entry=entry if asked.store else None, **options
    )
    return Output(sums, out, beyond)


def _exp_logits(place: Place, asked: Asked) -> Found:
    triton = place.module("triton")
    if asked.tf32:
        place.only_compiled("TF32")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    inputs = _inputs(place, asked)
    anchor = _anchors(triton, inputs, asked)
    begin = time.perf_counter()
    got = _run(triton, inputs, asked, anchor)
    synchronize(place.device)
    found = Found(words=f"first call {time.perf_counter() - begin:.1f} s")
    wide = Inputs(inputs.hidden.double(), _wide(inputs.head), inputs.labels)
    _hold(found, place, asked, wide, got, _run(oracle, wide, asked, anchor.double()))
    return found


def _hold(  # found and place beside what there is to compare
    found: Found, place: Place, asked: Asked, wide: Inputs, got: Output, expected: Output
) -> None:
    sums, true = got.sums, expected.sums
    found.hold("anchor", largest(sums.anchor, true.anchor), asked.allowed)
    found.hold("S", largest(sums.sum, true.sum, true.sum), asked.allowed)
    if got.out is not None and expected.out is not None and got.beyond is not None:
        allowed = asked.allowed + place.rounding(asked.dtype)
        found.hold("E", relative(got.out, expected.out), allowed)
        written = int((~got.beyond.isnan()).sum())
        found.hold("written between E's rows", written, 0.0)
    if not asked.stats:
        return
    z = oracle.logits_of(wide.hidden, wide.head)
    distance = z - true.anchor.unsqueeze(1)
    e = distance.exp().scatter(1, wide.labels.unsqueeze(1), 0.0)
    for name, mine, theirs, size in (
        ("entropy", sums.entropy, true.entropy, (e * distance.abs()).sum(1) + true.sum),
        ("collision", sums.collision, true.collision, None),
        ("logits", sums.logits, true.logits, z.abs().sum(1)),
    ):
        if mine is None or theirs is None:
            continue
        # Beside the label's own part of it, what is smaller may be flushed.
        size = theirs + torch.e ** (2 * COLLISION_SHIFT) if size is None else size
        found.hold(name, largest(mine, theirs, size), 4 * asked.allowed)
    if sums.top is not None and true.top is not None:
        found.hold("top", largest(sums.top, true.top), asked.allowed * 4)
        wrong = (_first_maximum(sums) != _first_maximum(true)).sum()
        found.hold("first maxima", int(wrong), 0.0)


def _first_maximum(sums: ExpSums) -> Tensor:  # [N] bool
    assert sums.own is not None
    assert sums.top is not None
    assert sums.earlier is not None
    return (sums.own >= sums.top) & (sums.own > sums.earlier)


# ---- The table

_WAYS = {
    "bf16 with E": Asked(),
    "bf16 without E": Asked(store=False),
    "bf16 with part of E": Asked(columns=0.4),
    "one row": Asked(rows=1),
    "bias, softcap, scale": Asked(head=_SCALED),
    "flagged rows": Asked(flagged=True),
    "statistics": Asked(stats=_STATS),
    "statistics, softcap, flagged": Asked(stats=_STATS, head=_SCALED, flagged=True),
    "any address": Asked(aligned=False),
    "fp16": Asked(dtype=torch.float16),
    "fp32": Asked(dtype=torch.float32),
    "fp32, any address": Asked(dtype=torch.float32, aligned=False),
    "tf32": Asked(dtype=torch.float32, tf32=True),
}


def _enter(name: str, asked: Asked) -> None:
    check(f"exp_logits {name}")(lambda place: _exp_logits(place, asked))


for _name, _asked in _WAYS.items():
    _enter(_name, _asked)


@check("exp_logits few rows")
def few_rows(place: Place) -> Found:
    """They take another tile, and get the bits that they have among many."""
    triton, asked = place.module("triton"), Asked()
    inputs = _inputs(place, asked)
    anchor = _anchors(triton, inputs, asked)
    whole = _run(triton, inputs, asked, anchor)
    few = Inputs(inputs.hidden[:17], inputs.head, inputs.labels[:17])
    part = _run(triton, few, dataclasses.replace(asked, rows=17), anchor[:17])
    found = Found()
    found.hold_bits("S", part.sums.sum, whole.sums.sum[:17])
    assert part.out is not None
    assert whole.out is not None
    # The entries of the labels are the call's own.
    there = torch.ones_like(part.out, dtype=torch.bool).scatter(1, few.labels.unsqueeze(1), False)
    found.hold_bits("E", part.out[there], whole.out[:17][there])
    wide = Inputs(few.hidden.double(), _wide(few.head), few.labels)
    _hold(found, place, asked, wide, part, _run(oracle, wide, asked, anchor[:17].double()))
    return found


@check("exp_logits computed again")
def again(place: Place) -> Found:
    """E in the backward is to the bit what the forward summed, of flagged rows too."""
    triton, asked = place.module("triton"), Asked(flagged=True)
    inputs = _inputs(place, asked)
    anchor = _anchors(triton, inputs, asked)
    first = _run(triton, inputs, asked, anchor)
    flags = first.sums.anchor != anchor
    if not bool(flags.any()):
        raise RuntimeError("no row was flagged")
    fixed = {"fixed_anchor": True, "reanchored": flags}
    second = _run(triton, inputs, asked, first.sums.anchor, **fixed)
    found = Found()
    assert first.out is not None
    assert second.out is not None
    found.hold_bits("S", second.sums.sum, first.sums.sum)
    found.hold_bits("E", second.out, first.out)
    return found


def _target_logits(place: Place, backend: str) -> Found:
    module, found = place.module(backend), Found()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for options in ({}, _SCALED):
            hidden, head, labels = _inputs(place, Asked(dtype=dtype, head=options))
            got = module.target_logits(hidden, head, labels)
            expected = oracle.target_logits(hidden.double(), _wide(head), labels)
            kind = str(dtype).removeprefix("torch.")
            found.hold(f"{kind}{' scaled' * bool(options)}", largest(got, expected), _ERROR)
    return found


@check("target_logits triton")
def target_logits_triton(place: Place) -> Found:
    return _target_logits(place, "triton")


@check("target_logits cuda")
def target_logits_cuda(place: Place) -> Found:
    return _target_logits(place, "cuda")
