"""Which tile exp_logits uses: the one checked in, or with FASTDPO_AUTOTUNE=1 the fastest of a few.

Tuning happens once per process, architecture, precision and kind of head, at the first call that
needs the tile and never at import; the winner is printed as a line of `configs.CONFIGS`. It is
found before that first call computes anything and then serves every number of rows, E or not, so
that a row's bits depend neither on its batch nor on what was called before. Small calls are tuned
on their rows repeated.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import PTXASError

from ..contract import Head
from ..workspace import padded_empty
from .configs import FEW_ROWS, Tile, pick
from .exp_logits import Asked, kind_of, prepare, regular, tile_for
from .launch import Launch, Target, on_device

ENVIRONMENT_VARIABLE = "FASTDPO_AUTOTUNE"
_ROWS = 4096  # a training step's, in whole waves of tiles on the larger GPUs
_CHOICES = {
    ("rows", "columns"): ((128, 256), (128, 128), (256, 128), (64, 128)),
    ("depth",): ((32,), (64,), (128,)),
    ("warps",): ((4,), (8,)),
    ("stages",): ((2,), (3,), (4,), (5,)),
    ("chunks",): ((1,), (2,), (4,)),
    ("group",): ((8,), (16,), (32,)),
}
# Small enough for two programs on a processor of Hopper: the epilogue of one runs under the product
# of the other.
_RESIDENT: dict[str, Any] = {
    "rows": 128,
    "columns": 128,
    "warps": 4,
    "stages": 3,
    "chunks": 4,
    "residents": 2,
}
_WARPGROUP = 4  # warps, which share one of Hopper's matrix instructions
_tuned: dict[tuple[str, str, bool], Tile] = {}


def tile_of(
    hidden: Tensor,  # [N, D]
    head: Head,
    target: Target,
) -> Tile:
    """The tile for this call."""
    tuning = os.environ.get(ENVIRONMENT_VARIABLE) == "1" and target.arch != "interpreter"
    # Rows at any address take the plain tile, whatever is fastest for others.
    if not tuning or not regular(hidden, head.weight, None):
        return tile_for(target, hidden, head)
    key = (target.arch, kind_of(hidden, target.arch), head.softcap is not None)
    if key not in _tuned:
        with on_device(hidden.device):
            _tuned[key] = _fastest(pick(*key), hidden, head, target, key)
    tile = _tuned[key]
    return tile.few_rows() if hidden.shape[0] <= FEW_ROWS < tile.rows else tile


def candidates(shipped: Tile) -> list[Tile]:
    """The shipped tile, those that differ from it in at most two of the choices, and where tiles
    are fed by descriptors, one for two programs a processor with its neighbours.
    """
    found = [shipped]
    shipped_values = [tuple(getattr(shipped, name) for name in names) for names in _CHOICES]
    choices = [
        (own, *(c for c in others if c != own))
        for own, others in zip(shipped_values, _CHOICES.values(), strict=True)
    ]
    for values in itertools.product(*choices):
        changes = [
            dict(zip(names, value, strict=True))
            for names, value, own in zip(_CHOICES, values, shipped_values, strict=True)
            if value != own
        ]
        if 0 < len(changes) <= 2:
            changed = {k: v for change in changes for k, v in change.items()}
            found.append(dataclasses.replace(shipped, **changed))
    if shipped.descriptors:
        resident = dataclasses.replace(shipped, **_RESIDENT)
        found += [dataclasses.replace(resident, group=group) for (group,) in _CHOICES["group",]]
    return [_halving(tile) for tile in found]


def _halving(tile: Tile) -> Tile:
    """Half a warpgroup would use another instruction, and give a row of few other bits."""
    return dataclasses.replace(tile, halves=tile.halves and tile.warps >= 2 * _WARPGROUP)


def _fastest(
    shipped: Tile,
    hidden: Tensor,  # [N, D]
    head: Head,
    target: Target,
    key: tuple[str, str, bool],
) -> Tile:
    rows = torch.arange(_ROWS, device=hidden.device) % hidden.shape[0]
    x = hidden[rows].contiguous()
    labels, anchor = rows % head.vocab_size, x.new_zeros(_ROWS, dtype=torch.float32)
    # With E, so that a tile without the registers or the shared memory to store it cannot win.
    out = padded_empty(_ROWS, head.vocab_size, x)
    tiles = candidates(shipped)
    asked = Asked(x, head, labels, anchor, fixed_anchor=True, out=out)
    launches = [prepare(asked, target, tile).launches[0] for tile in tiles]
    _compile(launches)
    timed: list[tuple[float, Tile]] = []
    for tile, launch in zip(tiles, launches, strict=True):
        try:
            timed.append((_milliseconds(launch), tile))
        except (triton.OutOfResources, triton.CompilationError, PTXASError) as refusal:
            print(f"fastdpo autotune: {tile}: {type(refusal).__name__}", file=sys.stderr)
    if not timed:
        raise RuntimeError(f"fastdpo autotune: no tile of {key} compiles and fits")
    milliseconds, best = min(timed, key=lambda entry: entry[0])
    print(f"fastdpo autotune {key}: {milliseconds:.3f} ms", file=sys.stderr)
    _, kind, softcap = key
    name = "softcap" if softcap and kind == "half" else kind
    print(f"        {name!r}: {best!r},", file=sys.stderr)
    return best


def _compile(launches: list[Launch]) -> None:
    """All of them, side by side; one that does not compile will say so when it is timed."""
    pool = ThreadPoolExecutor(os.cpu_count())
    with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)


def _milliseconds(launch: Launch) -> float:
    def run() -> None:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)

    return triton.testing.do_bench(run, warmup=20, rep=100)
