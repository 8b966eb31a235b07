"""Which tile exp_logits uses: the one checked in, or with FASTDPO_AUTOTUNE=1 the fastest of a few, found once and printed.

Tuning happens at the first call of each (architecture, kind of head, E or not), on that call's own tensors, never at
import. Candidates keep what a row's bits depend on equal for many and few rows by construction (`Tile.few_rows`).
The winner is printed as a line of `configs.CONFIGS`.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
import triton
from torch import Tensor

from fastdpo.backends.triton.configs import FEW_ROWS, Tile
from fastdpo.backends.triton.exp_logits import kind_of, plan, tile_for
from fastdpo.backends.triton.launch import Target, interpreted
from fastdpo.head import Head

_tuned: dict[tuple[str, str, bool], Tile] = {}


def tuned_tile(
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
    anchor: Tensor,  # [N]
    out: Tensor | None,  # [N, K]
    target: Target,
) -> Tile:
    shipped = tile_for(target, hidden, head)
    if os.environ.get("FASTDPO_AUTOTUNE") != "1" or interpreted() or hidden.shape[0] <= FEW_ROWS:
        return shipped
    # One tile serves calls with and without E: their sums have to agree to the bit.
    key = (target.arch, kind_of(hidden), head.softcap is not None)
    if key not in _tuned:
        _tuned[key] = _fastest(shipped, hidden, head, labels, anchor, target, key)
    return _tuned[key]


def candidates(shipped: Tile) -> list[Tile]:
    """Tiles worth trying beside the shipped one; those that do not compile or fit are skipped."""
    found = [shipped]
    for (rows, columns), depth, warps, stages, chunks, group in itertools.product(
        [(128, 256), (128, 128), (64, 256), (256, 128)], [32, 64, 128], [4, 8], [2, 3, 4, 5], [1, 2, 4], [8, 16, 32]
    ):
        near = sum(
            a != b
            for a, b in zip(
                (rows, columns, depth, warps, stages, chunks, group),
                (shipped.rows, shipped.columns, shipped.depth, shipped.warps, shipped.stages, shipped.chunks, shipped.group),
                strict=True,
            )
        )
        if 0 < near <= 2:
            found.append(
                Tile(rows, columns, depth, warps, stages, chunks, group, shipped.descriptors, shipped.flatten)
            )
    return found


def _fastest(
    shipped: Tile,
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
    anchor: Tensor,  # [N]
    target: Target,
    key: tuple[str, str, bool],
) -> Tile:
    # With E of its own, so that a candidate without the registers or memory to store it does not win.
    out = torch.empty(hidden.shape[0], head.vocab_size, dtype=hidden.dtype, device=hidden.device)
    timed: list[tuple[float, Tile]] = []
    for tile in candidates(shipped):
        main = plan(hidden, head, labels, anchor, True, out, None, (), None, target, tile).launches[0]
        try:
            milliseconds = triton.testing.do_bench(
                lambda main=main: main.kernel[main.grid](**main.arguments, **main.options), warmup=20, rep=100
            )
        except (triton.OutOfResources, triton.CompilationError) as refusal:
            print(f"fastdpo autotune: {tile}: {type(refusal).__name__}", file=sys.stderr)
            continue
        timed.append((milliseconds, tile))
    milliseconds, best = min(timed, key=lambda entry: entry[0])
    print(f"fastdpo autotune {key}: {milliseconds:.3f} ms\n        {key[1]!r}: {best!r},", file=sys.stderr)
    return best
