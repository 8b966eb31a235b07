"""python -m benchmarks.smoke.times: each kernel's time beside its floor's, a line of JSON each.

A floor is the vendor's product, or a copy of as many bytes; both run in turns with what is held
against them, so that they share clock and temperature. What is printed is known, whatever becomes
of the process afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.kernels.comparison import ROTATE, copy_of, serving
from benchmarks.measure import Protocol, Step, interleaved, quantiles
from benchmarks.smoke.clock import Clock
from benchmarks.smoke.process import GRACE, failed, said
from fastdpo.backends.contract import Head, LogitMap
from fastdpo.backends.triton import autotune
from fastdpo.backends.triton.configs import Tile, pick
from fastdpo.backends.triton.exp_logits import Asked, prepare
from fastdpo.backends.triton.launch import Launch, target_of
from fastdpo.backends.triton.launch import run as launch
from fastdpo.backends.workspace import padded_empty
from fastdpo.loss import linear_dpo_loss

_PROTOCOL = Protocol(warmup=2, min_rounds=5, max_rounds=40, seconds=0.15)
_SIZES = {"cuda": (4096, 128_256, 4096), "cpu": (32, 515, 48)}
_SEQUENCES = 8
_COPY = "copy"


@dataclass(frozen=True)
class Timed:
    """What one line times."""

    name: str
    step: Step
    floor: str | None = None  # an earlier line's name
    operations: float = 0.0
    bytes: float = 0.0


class Lines:
    """Measures and prints; what raises costs its own line alone."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._clock = device, Clock(device.type == "cuda")
        self._floors: dict[str, Step] = {}

    def __call__(self, timed: Timed) -> None:
        floor = None if timed.floor is None else self._floors.get(timed.floor)
        steps = {"mine": timed.step, **({} if floor is None else {"floor": floor})}
        row: dict[str, Any] = {"time": timed.name, "verdict": "ok"}
        begin = time.monotonic()
        try:
            taken = {
                k: quantiles(v) for k, v in interleaved(steps, self._device, _PROTOCOL).items()
            }
        except OutOfResources as error:  # of a tile that nobody ships
            row |= {"verdict": "absent", "words": said(error)}
        except Exception as error:
            row |= failed(error)
        else:
            seconds = taken["mine"]["median"]
            row |= {"seconds": taken["mine"], **self._clock.between(begin, time.monotonic())}
            if "floor" in taken:
                row |= {"floor": timed.floor, "floor_seconds": taken["floor"]}
                row["multiple_of_floor"] = seconds / taken["floor"]["median"]
            if timed.operations:
                row["tera_operations_per_second"] = timed.operations / seconds / 1e12
            if timed.bytes:
                row["tera_bytes_per_second"] = timed.bytes / seconds / 1e12
            self._floors[timed.name] = timed.step
        print(json.dumps(row), flush=True)

    def forget(self) -> None:
        """The floors, and with them what they hold in memory."""
        self._floors.clear()

    def close(self) -> None:
        self._clock.close()


@dataclass
class Batch:
    """Of a large head, in two sets that calls alternate between."""

    hidden: list[Tensor]  # [N, D] each
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    anchors: list[Tensor]  # [N] each
    e: Tensor  # [N, V], padded

    @classmethod
    def make(cls, device: torch.device) -> Batch:
        rows, vocab, depth = _SIZES[device.type]
        hidden = [torch.randn(rows, depth, device=device).bfloat16() for _ in range(ROTATE)]
        weight = torch.empty(vocab, depth, device=device, dtype=torch.bfloat16)
        for block in weight.split(8192):  # no fp32 copy of the whole weight
            block.copy_(torch.randn(block.shape, device=device) * 2.0 / depth**0.5)
        labels = torch.randint(vocab, (rows,), device=device)
        anchors = [(x.float() * weight[labels].float()).sum(1) for x in hidden]
        return cls(hidden, weight, labels, anchors, padded_empty(rows, vocab, weight))

    @property
    def operations(self) -> float:
        """Of one product."""
        return 2.0 * self.e.numel() * self.weight.shape[1]


def products(batch: Batch) -> Iterator[Timed]:
    x, w, e, one = batch.hidden, batch.weight, batch.e, batch.operations
    zeros = torch.zeros_like(x[0])
    yield Timed("mm", lambda i: torch.mm(x[i % ROTATE], w.t(), out=e), None, one)
    # As many instructions, and less power: what of a difference is the clock's.
    yield Timed("mm of zeros", lambda i: torch.mm(zeros, w.t(), out=e), "mm", one)


def tiles(shipped: Tile, arch: str) -> dict[str, Tile]:
    """The shipped one, and what may be faster and has room."""
    change = dataclasses.replace
    found = {
        "two chunks": change(shipped, chunks=2),
        "three stages": change(shipped, stages=3),
        "two chunks, three stages": change(shipped, chunks=2, stages=3),
        "group 8": change(shipped, group=8),
        "group 32": change(shipped, group=32),
    }
    if shipped.descriptors:
        two = change(shipped, **autotune.RESIDENT, halves=False)
        found |= {
            _flattened(not shipped.flatten): change(shipped, flatten=not shipped.flatten),
            "two residents": two,
            f"two residents, {_flattened(not two.flatten)}": change(two, flatten=not two.flatten),
        }
    chosen = {"": shipped}
    for name, tile in found.items():
        if tile not in chosen.values() and autotune.has_room(tile, arch, 2):
            chosen[name] = tile
    return chosen


def _flattened(flatten: bool) -> str:
    return "flattened" if flatten else "not flattened"


def exponentials(batch: Batch) -> Iterator[Timed]:
    """The product's launch alone, by every tile."""
    target = target_of(batch.weight)
    shipped = pick(target.arch, "half", False)
    head = Head(batch.weight)

    def launches(tile: Tile, out: Tensor | None) -> list[Launch]:
        return [
            prepare(
                Asked(x, head, batch.labels, anchor, fixed_anchor=True, out=out), target, tile
            ).launches[0]
            for x, anchor in zip(batch.hidden, batch.anchors, strict=True)
        ]

    asked: dict[str, list[Launch]] = {}
    kept = tiles(shipped, target.arch) if batch.weight.is_cuda else {"": shipped}
    for name, tile in kept.items():
        for out in (batch.e, None) if name in ("", "two residents") else (batch.e,):
            what = f"exp_logits {'without' if out is None else 'with'} E"
            asked[f"{what}, {name}" if name else what] = launches(tile, out)
    if batch.weight.is_cuda:  # all of them side by side
        autotune.compile_ahead([two[0] for two in asked.values()])
    for name, two in asked.items():
        step = lambda i, two=two: launch([two[i % ROTATE]], batch.weight.device)  # noqa: E731
        yield Timed(name, step, "mm", batch.operations)


def gradients(batch: Batch) -> Iterator[Timed]:
    """The backward's products, as `core.linear` takes them."""
    x, w, e, one = batch.hidden, batch.weight, batch.e, batch.operations
    e.normal_()
    yield Timed("mm dx", lambda i: torch.mm(e, w), "mm", one)
    if e.is_cuda:
        half, wide = len(e) // 2, torch.float32
        step = lambda i: [torch.mm(part, w, out_dtype=wide) for part in e.split(half)]  # noqa: E731
        yield Timed("mm dx, fp32, two blocks", step, "mm", one)
    grad = torch.empty_like(w)
    yield Timed("mm dW", lambda i: torch.mm(e.t(), x[i % ROTATE], out=grad), "mm", one)
    if e.is_cuda:
        options: dict[str, Any] = {"beta": 0, "alpha": 2.0**-43, "out": grad}
        step = lambda i: torch.addmm(grad, e.t(), x[i % ROTATE], **options)  # noqa: E731
        yield Timed("addmm dW, lifted", step, "mm", one)


def steps(batch: Batch) -> Iterator[Timed]:
    """linear_dpo_loss, half of whose positions carry loss, which the caller knows."""
    depth = batch.weight.shape[1]
    labels = batch.labels.view(_SEQUENCES, -1)
    labels = torch.cat([torch.full_like(labels, -100), labels], 1)
    index = (labels.flatten() != -100).nonzero().squeeze(1)
    hidden = [
        torch.cat([x.view(_SEQUENCES, -1, depth)] * 2, 1).requires_grad_() for x in batch.hidden
    ]
    ref = torch.zeros(_SEQUENCES, device=labels.device)

    def step(trained: bool, kept: int | None) -> Step:
        weight = batch.weight.detach().requires_grad_(trained)

        def run(i: int) -> object:
            x = hidden[i % ROTATE]
            out = linear_dpo_loss(
                x, weight, labels, ref_logps=ref, workspace_bytes=kept, row_index=index
            )
            return torch.autograd.grad(out.loss, (x, weight) if trained else (x,))

        return run

    for name, units, trained, kept in (
        ("trained head", 3, True, None),
        ("trained head, workspace 0", 3, True, 0),
        ("frozen head", 2, False, None),
    ):
        what = f"step {name} ({units} products)"
        yield Timed(what, step(trained, kept), "mm", units * batch.operations)


def logits(device: torch.device) -> Iterator[Timed]:
    """What reads logits that exist, beside copies of as many bytes."""
    rows, vocab, _ = _SIZES[device.type]
    z = torch.randn(rows, vocab, device=device).bfloat16()
    labels = torch.randint(vocab, (rows,), device=device)
    grad = torch.ones(rows, device=device)
    size = z.nbytes
    yield Timed(_COPY, copy_of(2 * size, device), None, 0.0, 2 * size)
    yield Timed("copy of half", copy_of(size, device), _COPY, 0.0, size)
    found, _ = serving("logits_logps", z)
    found.pop("torch", None)
    for name, module in found.items():
        for kind, logit_map in (("", LogitMap()), (" softcap", LogitMap(softcap=30.0))):
            forward = lambda i, m=module, c=logit_map: m.logits_logps(z, labels, c)  # noqa: E731
            yield Timed(f"logits forward{kind}, {name}", forward, "copy of half", 0.0, size)
            lse = module.logits_logps(z, labels, logit_map)[1]
            out = torch.empty_like(z)

            def backward(
                i: int,
                module: Any = module,
                lse: Tensor = lse,
                logit_map: LogitMap = logit_map,
                out: Tensor = out,
            ) -> None:
                module.logits_logps_backward(grad, z, labels, lse, logit_map, out)

            yield Timed(f"logits backward{kind}, {name}", backward, _COPY, 0.0, 2 * size)


def attention(device: torch.device) -> Iterator[Timed]:
    """A small model's step on packed rows: FlexAttention beside a mask of every pair of tokens."""
    from benchmarks.inputs import BETA
    from benchmarks.step import data, models
    from fastdpo.data import PairCollator
    from fastdpo.integrations import hf

    on_gpu = device.type == "cuda"
    shape, scale, count = ("llama-36m", 1.0, 8) if on_gpu else ("tiny", 0.02, 2)
    lengths = data.SHAPES["ultrafeedback-like"].scaled(scale)
    pairs = data.pairs(lengths, count, models.vocabulary(shape))

    def step(kind: str) -> Step:
        model = models.build(shape, device, attention=kind)
        batch = PairCollator(data.PAD, "packed", attention=kind)(pairs)
        there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

        def run(i: int) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = hf.dpo_loss(model, there, reference_free=True, beta=BETA).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        return run

    yield Timed("model step packed, sdpa", step("sdpa"))
    if on_gpu:  # FlexAttention has no backward on a CPU
        name = "model step packed, flex_attention"
        yield Timed(name, step("flex_attention"), "model step packed, sdpa")


def run(device: torch.device, lines: Lines) -> None:
    _large_head(device, lines)
    lines.forget()
    for part in (logits, attention):
        _each(lines, part.__name__, lambda part=part: part(device))


def _large_head(device: torch.device, lines: Lines) -> None:
    batch = Batch.make(device)
    for part in (products, exponentials, gradients, steps):
        _each(lines, part.__name__, lambda part=part: part(batch))


def _each(lines: Lines, name: str, part: Callable[[], Iterator[Timed]]) -> None:
    """What a part needs to begin may fail as well."""
    try:
        for timed in part():
            lines(timed)
    except Exception as error:
        print(json.dumps({"time": name, **failed(error)}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke.times")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    # The end, should whoever began this be gone, or a kernel hang.
    signal.alarm(max(1, int(args.seconds)) + GRACE)
    torch.manual_seed(0)
    lines = Lines(args.device)
    try:
        run(args.device, lines)
    finally:
        lines.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
