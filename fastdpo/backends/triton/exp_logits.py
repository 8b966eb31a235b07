"""exp_logits: the launches behind the primitive, and the memory between them.

    1. the product and its epilogue: partial sums of every (row, vocabulary tile), and E
    2. `reduce_sums`: sums per row, a flag for each row whose sum left the range, E's label entries
    3. of flagged rows the maxima
    4. their reduction into new anchors
    5. the exponentials again
    6. their sums

For `is_top1` the labels' logits again, and ties (`settle_ties`), between 2 and 3.

Numbers 3 to 6 end at once where nothing is flagged. Where the anchors are fixed, 3 and 4 are left
out, and the caller says which rows are flagged, if any: those that were when the anchors were
found. E is then to the bit what was summed, whichever kernel had summed it: the kernels for flagged
rows have tiles of their own, and another order of the sum over D is another logit.
Nothing here reads a device value on the host. Scratch: 4·P·T·N bytes, P = 1 + the statistics asked
for, T = ⌈V / columns⌉ of the main tile or of the plain one, whichever has fewer columns (128 for
16-bit inputs: 8 MB for a block of 2,048 rows of 128,256 logits; 32 for fp32).

`hidden` is taken as it comes, contiguous rows: the rows that carry loss were compacted by the
caller. That copy moves 4·N·D bytes once, 134 MB or 31 µs for 8,192 × 4,096 on an H200 against 11 ms
for the product (0.3 %), whereas a gather in the kernel would give up the descriptors that feed it,
since a two-dimensional one cannot skip rows (Blackwell's gathering ones take four rows at a time).
Where pointers feed the kernel a gather would cost nothing, but the copy is needed all the same: the
backward's products are the vendor's, and read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..contract import Head, LogitMap
from .configs import (
    FEW_ROWS,
    Tile,
    has_tf32,
    pick,
    pick_plain,
    supported_arch,
)
from .exp_logits_pointers import exp_logits_pointers
from .exp_logits_reanchored import exp_logits_reanchored
from .exp_logits_tma import exp_logits_tma
from .launch import Launch, Target
from .reduce_sums import reduce_sums
from .settle_ties import settle_ties

STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_SPLITS = 8  # programs that share a row in `settle_ties`
_SETTLE = {"BLOCK_C": 8, "BLOCK_D": 256}
# Few steps in the interpreter, which takes one after the other.
_SPLITS_INTERPRETED, _SETTLE_INTERPRETED = 1, {"BLOCK_C": 32, "BLOCK_D": 64}
_OPERANDS = (
    "hidden_ptr", "weight_ptr", "hidden_stride", "weight_stride", "weight_depth_stride",
)  # fmt: skip
# A program's additions wait for one another: few steps (4 for a vocabulary of 128,256) and many
# programs, each of a memory sector's rows.
_REDUCE = {"BLOCK_N": 8, "BLOCK_T": 128}
# Triton before 3.7.1 leaves out the fence that wgmma and tcgen05 need to see what cp.async copied
# (triton-lang/triton#9610, #10537).
_FENCES_COPIES = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) >= (3, 7, 1)


class Ties(NamedTuple):
    """What `settle_ties` writes."""

    own: Tensor  # [N]
    settled: Tensor  # [2 · SPLITS, N], top and earlier; −∞ where there was nothing to settle


@dataclass(frozen=True)
class Asked:
    """What a call asks of the primitive, for its launches."""

    hidden: Tensor  # [N, D]
    head: Head
    labels: Tensor  # [N]
    anchor: Tensor  # [N]
    fixed_anchor: bool = False
    reanchored: Tensor | None = None  # [N] int8, with fixed_anchor
    out: Tensor | None = None  # [N, K]
    label_entry: Tensor | None = None  # [N]
    stats: tuple[str, ...] = ()
    label_logits: Tensor | None = None  # [N] for "mean_logits": the labels', 0 where elsewhere
    tolerance: Tensor | None = None  # [N] for "is_top1"


class Launches(NamedTuple):
    launches: list[Launch]
    anchor: Tensor  # [N] the anchors used
    sums: Tensor  # [P, N] Σ e, then the statistics asked for in the order of STATS
    ties: Ties | None = None  # with is_top1


def curve(head: Head | LogitMap) -> tuple[float, float | None]:
    """(inner, outer) of `language.head_curve`."""
    if head.softcap is None:
        return head.gain, None
    return head.scale / head.softcap, head.softcap / head.temperature


def kind_of(hidden: Tensor, arch: str) -> str:
    """How the product is taken: of 16-bit inputs, or of fp32 inputs as PyTorch's own settings say,
    where the architecture has TF32.
    """
    if hidden.element_size() == 2:
        return "half"
    return "tf32" if _wants_tf32() and has_tf32(arch) else "ieee"


def _wants_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tile_for(target: Target, hidden: Tensor, head: Head) -> Tile:
    tile = pick(target.arch, kind_of(hidden, target.arch), head.softcap is not None)
    return tile.few_rows() if hidden.shape[0] <= FEW_ROWS < tile.rows else tile


def regular(hidden: Tensor, weight: Tensor, out: Tensor | None) -> bool:
    """Whether rows are contiguous, start at multiples of 16 bytes and have entries of one size.

    Descriptors need it, and so do the wide copies of the tiles tuned for pointers.
    """
    return all(
        tensor.stride(1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.element_size() == hidden.element_size()
        for tensor in (hidden, weight, out)
        if tensor is not None
    )


def prepare(asked: Asked, target: Target, tile: Tile) -> Launches:
    hidden, head, labels, anchor = asked.hidden, asked.head, asked.labels, asked.anchor
    out, stats = asked.out, [name for name in STATS if name in asked.stats]
    rows, vocabulary = hidden.shape[0], head.vocab_size
    quantities = 1 + len(stats)
    kind = kind_of(hidden, target.arch)
    plain = pick_plain(target.arch, kind)
    if not regular(hidden, head.weight, out):
        tile = plain
    column_tiles, plain_column_tiles = (-(-vocabulary // t.columns) for t in (tile, plain))
    # [P, T, N], with T that of the main tile or the plain one.
    partial = anchor.new_empty(quantities * max(column_tiles, plain_column_tiles) * rows)
    sums = anchor.new_empty(quantities, rows)
    inner, outer = curve(head)
    shared = {
        "bias_ptr": head.bias, "labels_ptr": labels, "partial_ptr": partial,
        "N": rows, "V": vocabulary, "D": hidden.shape[1], "inner": inner, "outer": outer,
        "ENTROPY": "entropy" in stats, "COLLISION": "log_sum_sq_probs" in stats,
        "LOGITS": "mean_logits" in stats, "TOP": "is_top1" in stats,
    }  # fmt: skip
    pointers = {
        "hidden_ptr": hidden, "weight_ptr": head.weight, "out_ptr": out,
        "hidden_stride": hidden.stride(0),
        "weight_stride": head.weight.stride(0), "weight_depth_stride": head.weight.stride(1),
        "out_stride": 0 if out is None else out.stride(0), "K": 0 if out is None else out.shape[1],
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
    }  # fmt: skip

    programs = -(-rows // tile.rows) * column_tiles
    if tile.descriptors:
        described = {
            "hidden": TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
            "weight": TensorDescriptor.from_tensor(head.weight, [tile.columns, tile.depth]),
            "out": None if out is None
            else TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // tile.chunks]),
            "PRECISION": pointers["PRECISION"], "FLATTEN": tile.flatten,
        }  # fmt: skip
        kernel, operands = exp_logits_tma, described
        programs = min(programs, target.processors * tile.residents)
    else:
        kernel, operands = exp_logits_pointers, pointers
    arguments = {**operands, **shared, **_shape(tile), "anchor_ptr": anchor, "GROUP": tile.group}
    main = Launch(kernel, (programs,), arguments, tile.warps, _stages(target, tile, kind))

    reduction = {
        "reanchored_ptr": None, "anchor_ptr": None, "new_anchor_ptr": None,
        "label_logit_ptr": asked.label_logits,
        "partial_ptr": partial, "sums_ptr": sums, "entry_ptr": asked.label_entry,
        "labels_ptr": labels,
        "out_ptr": out, "out_stride": pointers["out_stride"], "K": pointers["K"], "N": rows,
        "T": column_tiles,
        "QUANTITIES": quantities, "LOGITS_AT": _position(stats, "mean_logits"),
        "TOP_AT": _position(stats, "is_top1"), "AGAIN": False, **_REDUCE,
    }  # fmt: skip
    reduce_grid = (-(-rows // _REDUCE["BLOCK_N"]),)
    first = [main, Launch(reduce_sums, reduce_grid, reduction)]
    ties = None
    if "is_top1" in stats:
        index = _position(stats, "is_top1")
        tiles_maxima = partial[index * column_tiles * rows :][: column_tiles * rows]
        interpreted = target.arch == "interpreter"
        splits = _SPLITS_INTERPRETED if interpreted else _SPLITS
        ties = Ties(anchor.new_empty(rows), anchor.new_empty(2 * splits, rows))
        settling: dict[str, Any] = {
            **{name: pointers[name] for name in _OPERANDS}, "bias_ptr": head.bias,
            "labels_ptr": labels, "anchor_ptr": anchor, "tolerance_ptr": asked.tolerance,
            "top_ptr": sums[index], "maxima_ptr": tiles_maxima, "own_ptr": ties.own,
            "settled_ptr": ties.settled, "N": rows, "V": vocabulary, "D": hidden.shape[1],
            "T": column_tiles, "inner": inner, "outer": outer, "BLOCK_V": tile.columns,
            **(_SETTLE_INTERPRETED if interpreted else _SETTLE), "SPLITS": splits,
        }  # fmt: skip
        # Before flagged rows' maxima take the others' place; they have nothing to settle.
        first.append(Launch(settle_ties, (rows, splits), settling))
    if not asked.fixed_anchor:
        reanchored = torch.empty(rows, dtype=torch.int8, device=hidden.device)
        new_anchor = torch.empty_like(anchor)
    elif asked.reanchored is not None:
        reanchored, new_anchor = asked.reanchored, anchor
    else:
        return Launches(first, anchor, sums, ties)
    once_more = {"reanchored_ptr": reanchored, "AGAIN": True, "T": plain_column_tiles}
    again = {
        **pointers, **shared, **_shape(plain), "anchor_ptr": new_anchor,
        "reanchored_ptr": reanchored, "MAXIMA": False,
    }  # fmt: skip
    grid = (min(plain_column_tiles, target.processors),)
    last = [
        Launch(exp_logits_reanchored, grid, again, plain.warps, _stages(target, plain, kind)),
        Launch(reduce_sums, reduce_grid, {**reduction, **once_more}),
    ]
    if asked.fixed_anchor:
        return Launches([*first, *last], anchor, sums, ties)

    reduction = {
        **reduction, "reanchored_ptr": reanchored, "anchor_ptr": anchor,
        "new_anchor_ptr": new_anchor,
    }  # fmt: skip
    find = {
        **again, "MAXIMA": True, "out_ptr": None, "out_stride": 0, "K": 0,
        "ENTROPY": False, "COLLISION": False, "LOGITS": False, "TOP": True,
    }  # fmt: skip
    maxima = {
        **reduction, **once_more, "sums_ptr": new_anchor, "anchor_ptr": None, "entry_ptr": None,
        "label_logit_ptr": None, "QUANTITIES": 1, "LOGITS_AT": -1, "TOP_AT": 0,
    }  # fmt: skip
    first[1] = Launch(reduce_sums, reduce_grid, reduction)
    launches = [
        *first,
        Launch(exp_logits_reanchored, grid, find, plain.warps, _stages(target, plain, kind)),
        Launch(reduce_sums, reduce_grid, maxima),
    ]
    return Launches([*launches, *last], new_anchor, sums, ties)


def _stages(target: Target, tile: Tile, kind: str) -> int:
    """The tile's, or 1, with which nothing is copied asynchronously, where that would be a race."""
    own_proxy = supported_arch(target.arch) in ("sm_90", "sm_100") and tile.rows >= 64
    copies = own_proxy and kind != "ieee" and not tile.descriptors
    return 1 if copies and not _FENCES_COPIES else tile.stages


def _shape(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.rows, "BLOCK_V": tile.columns, "BLOCK_D": tile.depth, "CHUNKS": tile.chunks,
    }  # fmt: skip


def _position(stats: list[str], name: str) -> int:
    """Where a statistic's sum lies among the quantities, or −1."""
    return 1 + stats.index(name) if name in stats else -1
