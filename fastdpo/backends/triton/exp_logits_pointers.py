"""exp_logits through plain pointers: GPUs without descriptors, fp32 without tf32, any strides.

One program per tile. Operations and bytes are those of `exp_logits_tma`: 2·N·V·D and the epilogue's
7·N·V (24·N·V with a softcap); of s = 2 or 4 bytes per number, s·N·D + s·V·D·⌈N / (GROUP · BLOCK_M)⌉
are read and s·N·K written, and 4·N·⌈V / BLOCK_V⌉ for each quantity. For rows at any address (the
plain tile) that is a bound only: each number is loaded by itself, which takes longer than the
product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import store_sums, tile_epilogue
from .language import product_tile, tile_position


@triton.heuristics(
    {
        "EVEN_V": lambda args: args["V"] % args["BLOCK_V"] == 0,
        "EVEN_D": lambda args: args["D"] % args["BLOCK_D"] == 0,
    }
)
@triton.jit(do_not_specialize=["N"])
def exp_logits_pointers(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    out_ptr,  # [N, K] or None
    labels_ptr,  # [N] int
    anchor_ptr,  # [N] fp32
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
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    LOGITS: tl.constexpr,
    TOP: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    row_tiles = tl.cdiv(N, BLOCK_M)
    column_tiles = tl.cdiv(V, BLOCK_V)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    products = product_tile(
        hidden_ptr, weight_ptr, hidden_stride, weight_stride, weight_depth_stride,
        rows, column_tile * BLOCK_V + tl.arange(0, BLOCK_V), N, V, D, BLOCK_D, EVEN_V, EVEN_D,
        PRECISION,
    )  # fmt: skip

    mask = rows < N
    label = tl.load(labels_ptr + rows, mask=mask, other=-1).to(tl.int32)
    anchor = tl.load(anchor_ptr + rows, mask=mask, other=0.0)
    sums = tile_epilogue(
        products, bias_ptr, out_ptr, out_stride, K, anchor, label, rows, mask,
        row_tile * BLOCK_M, column_tile * BLOCK_V, V, inner, outer,
        False, CHUNKS, ENTROPY, COLLISION, LOGITS, TOP, EVEN_V,
    )  # fmt: skip
    here = partial_ptr + tl.cast(column_tile, tl.int64) * N + rows
    quantity_stride = tl.cast(column_tiles, tl.int64) * N
    store_sums(here, quantity_stride, mask, sums, ENTROPY, COLLISION, LOGITS, TOP)
