"""exp_logits again, for the rows that the first pass flagged: once for their maxima, once anchored
there.

A label so unlikely that Σ exp(z − a) leaves the range of fp32 must come out exact, and no one on
the host may look at the flags to find out whether there is one. So these launches always happen:
their few programs, min(⌈V / BLOCK_V⌉, processors), read the N flags, which is N bytes and N
comparisons each, and end. Where a row is flagged they do its row tile's product again: together
4·BLOCK_M·V·D operations, the epilogue's twice, and 2·s·V·D bytes of the weight for every such tile
(s = 2 or 4 bytes per number); s·K bytes of E and 4·⌈V / BLOCK_V⌉ per quantity for every such row.
Rows of the tile that are not flagged are computed and not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import store_sums, tile_epilogue
from .language import product_tile

_FLAGS_AT_ONCE = tl.constexpr(4096)


@triton.jit
def _any_reanchored(reanchored_ptr, N):
    seen = tl.zeros((_FLAGS_AT_ONCE,), tl.int32)
    for start in range(0, N, _FLAGS_AT_ONCE):
        rows = start + tl.arange(0, _FLAGS_AT_ONCE)
        seen |= tl.load(reanchored_ptr + rows, mask=rows < N, other=0).to(tl.int32)
    return tl.max(seen, 0) > 0


@triton.heuristics(
    {
        "EVEN_V": lambda args: args["V"] % args["BLOCK_V"] == 0,
        "EVEN_D": lambda args: args["D"] % args["BLOCK_D"] == 0,
    }
)
@triton.jit(do_not_specialize=["N"])
def exp_logits_reanchored(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    out_ptr,  # [N, K] or None
    labels_ptr,  # [N] int
    anchor_ptr,  # [N] fp32: the maxima, when they are known
    reanchored_ptr,  # [N] int8
    bias_ptr,  # [V] or None
    partial_ptr,  # [P, T, N] fp32
    hidden_stride,
    weight_stride,
    weight_depth_stride,
    out_stride,
    N,
    V,
    D,
    K,
    inner,
    outer,
    MAXIMA: tl.constexpr,  # only find them, with TOP alone
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    LOGITS: tl.constexpr,
    TOP: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    if not _any_reanchored(reanchored_ptr, N):
        return
    column_tiles = tl.cdiv(V, BLOCK_V)
    quantity_stride = tl.cast(column_tiles, tl.int64) * N
    for row_start in range(0, N, BLOCK_M):
        rows = row_start + tl.arange(0, BLOCK_M)
        mask = tl.load(reanchored_ptr + rows, mask=rows < N, other=0).to(tl.int32) > 0
        if tl.max(mask.to(tl.int32), 0) > 0:
            label = tl.load(labels_ptr + rows, mask=mask, other=-1).to(tl.int32)
            if MAXIMA:
                anchor = tl.zeros((BLOCK_M,), tl.float32)
            else:
                anchor = tl.load(anchor_ptr + rows, mask=mask, other=0.0)
                # Where nothing can occur the sums are 0, and not exp(−∞ + ∞).
                anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
            for column_tile in range(tl.program_id(0), column_tiles, tl.num_programs(0)):
                start = column_tile * BLOCK_V
                products = product_tile(
                    hidden_ptr, weight_ptr, hidden_stride, weight_stride, weight_depth_stride,
                    rows, start + tl.arange(0, BLOCK_V), N, V, D, BLOCK_D, EVEN_V, EVEN_D,
                    PRECISION,
                )  # fmt: skip
                sums = tile_epilogue(
                    products, bias_ptr, out_ptr, out_stride, K, anchor, label, rows, mask,
                    row_start, start, V, inner, outer,
                    False, CHUNKS, ENTROPY, COLLISION, LOGITS, TOP, EVEN_V,
                )  # fmt: skip
                here = partial_ptr + tl.cast(column_tile, tl.int64) * N + rows
                if MAXIMA:
                    tl.store(here, sums[4], mask=mask)
                else:
                    store_sums(here, quantity_stride, mask, sums, ENTROPY, COLLISION, LOGITS, TOP)
