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
from .configs import FEW_ROWS, SHARED_MEMORY, Tile, pick, supported_arch
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
    ("flatten",): ((False,), (True,)),  # of the persistent kernel's loops
}
# Small enough for two programs on a processor of Hopper: the epilogue of one runs under the product
# of the other.
RESIDENT: dict[str, Any] = {
    "rows": 128,
    "columns": 128,
    "warps": 4,
    "stages": 3,
    "chunks": 4,
    "residents": 2,
}
_WARPGROUP = 4  # warps, which share one of Hopper's matrix instructions
# Numbers of a product that a thread holds: more spill, since it has 255 registers for all it does.
_MOST_ACCUMULATORS = 128
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


def candidates(shipped: Tile, arch: str, itemsize: int) -> list[Tile]:
    """The shipped tile, those that differ from it in at most two of the choices, and where tiles
    are fed by descriptors, one for two programs a processor with its neighbours; of all those, what
    an architecture has room for with operands of this size.
    """
    found = []
    choices = {
        names: values
        for names, values in _CHOICES.items()
        if shipped.descriptors or names != ("flatten",)
    }
    shipped_values = [tuple(getattr(shipped, name) for name in names) for names in choices]
    ordered = [
        (own, *(c for c in others if c != own))
        for own, others in zip(shipped_values, choices.values(), strict=True)
    ]
    for values in itertools.product(*ordered):
        changes = [
            dict(zip(names, value, strict=True))
            for names, value, own in zip(choices, values, shipped_values, strict=True)
            if value != own
        ]
        if 0 < len(changes) <= 2:
            changed = {k: v for change in changes for k, v in change.items()}
            found.append(dataclasses.replace(shipped, **changed))
    if shipped.descriptors:
        resident = dataclasses.replace(shipped, **RESIDENT)
        groups = [group for (group,) in _CHOICES["group",]]
        found += [
            dataclasses.replace(resident, group=group, flatten=flatten)
            for group, flatten in itertools.product(groups, (shipped.flatten, not shipped.flatten))
        ]
    return [shipped, *(_halving(tile) for tile in found if has_room(tile, arch, itemsize))]


def has_room(tile: Tile, arch: str, itemsize: int) -> bool:
    """Whether a tile can have the shared memory and the registers that it takes at least, by
    arithmetic: a compiler that finds it out takes seconds for each.
    """
    lanes = 64 if arch.startswith("gfx") else 32
    if tile.rows * tile.columns > _MOST_ACCUMULATORS * tile.warps * lanes:
        return False
    limit = SHARED_MEMORY[str(supported_arch(arch))]
    return tile.residents * least_shared(tile, itemsize) <= limit


def least_shared(tile: Tile, itemsize: int) -> int:
    """Bytes of shared memory that a program takes at least, barriers left out."""
    operands = (tile.rows + tile.columns) * tile.depth * itemsize
    if not tile.descriptors:  # what was copied last may be in registers
        return (tile.stages - 1) * operands
    # And the staging buffer of E's stores.
    return tile.stages * operands + tile.rows * (tile.columns // tile.chunks) * itemsize


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
    tiles = candidates(shipped, target.arch, x.element_size())
    asked = Asked(x, head, labels, anchor, fixed_anchor=True, out=out)
    launches = [prepare(asked, target, tile).launches[0] for tile in tiles]
    compile_ahead(launches)
    timed: list[tuple[float, Tile]] = []
    for tile, launch in zip(tiles, launches, strict=True):
        try:
            milliseconds = _milliseconds(launch)
        except (triton.OutOfResources, triton.CompilationError, PTXASError) as refusal:
            _say(f"fastdpo autotune: {tile}: {type(refusal).__name__}")
            continue
        _say(f"fastdpo autotune: {milliseconds:.3f} ms, {tile}")
        timed.append((milliseconds, tile))
    if not timed:
        raise RuntimeError(f"fastdpo autotune: no tile of {key} compiles and fits")
    milliseconds, best = min(timed, key=lambda entry: entry[0])
    _say(f"fastdpo autotune {key}: {milliseconds:.3f} ms")
    _, kind, softcap = key
    name = "softcap" if softcap and kind == "half" else kind
    _say(f"        {name!r}: {best!r},")
    return best


def _say(line: str) -> None:
    """At once: what was found is told, whatever ends the process."""
    print(line, file=sys.stderr, flush=True)


def compile_ahead(launches: list[Launch]) -> None:
    """All of them, side by side; one that does not compile will say so when it is timed."""
    pool = ThreadPoolExecutor(os.cpu_count())
    with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)


def _milliseconds(launch: Launch) -> float:
    def run() -> None:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)

    return triton.testing.do_bench(run, warmup=20, rep=100)
