"""exp_logits where the hardware has a tensor memory accelerator: persistent, fed by descriptors.

One program per processor walks over tiles of [BLOCK_M, BLOCK_V]; with FLATTEN the loop over tiles
and the loop over D are one, so that the copies of the next tile's operands run under this tile's
epilogue.

Operations: 2·N·V·D on the tensor cores, and in the epilogue about 7·N·V on other units (24·N·V with
a softcap). There instructions are what counts: of the sm_90 binary a warp issues 1,930 per tile of
128 × 256 (2,100 with E, 4,340 with E and a softcap), and each scheduler those of two warps: 3,900
to 8,700 cycles, beside the 16·D of the product, 65,536 at D = 4096. The epilogue adds 6 %, 13 %
with a softcap, and more where D is smaller (24 % at Gemma-2-2b's 2,304 with its softcap, 29 %
without one at 896). Nothing hides it: the warps that issue the product issue it too, and it would
take a second program on the same processor (`Tile.residents`, which FASTDPO_AUTOTUNE=1 tries).

Bytes, for 16-bit inputs: hidden 2·N·D and weight 2·V·D·⌈N / (GROUP · BLOCK_M)⌉ read from memory, as
a group's rows stay in L2; E 2·N·K written, which is 1/D of a byte per operation, 0.2 TB/s at full
speed and D = 4096; and 4·N·⌈V / BLOCK_V⌉ for each quantity summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import store_sums, tile_epilogue
from .language import multiply_add, tile_position


@triton.jit
def _of_rows(labels_ptr, anchor_ptr, rows, mask):
    label = tl.load(labels_ptr + rows, mask=mask, other=-1).to(tl.int32)
    return label, tl.load(anchor_ptr + rows, mask=mask, other=0.0)


@triton.heuristics({"EVEN_V": lambda args: args["V"] % args["BLOCK_V"] == 0})
@triton.jit(do_not_specialize=["N"])
def exp_logits_tma(
    hidden,  # descriptor of [N, D], blocks [BLOCK_M, BLOCK_D]
    weight,  # descriptor of [V, D], blocks [BLOCK_V, BLOCK_D]
    out,  # descriptor of [N, K], blocks [BLOCK_M, BLOCK_V / CHUNKS], or None
    labels_ptr,  # [N] int
    anchor_ptr,  # [N] fp32
    bias_ptr,  # [V] or None
    partial_ptr,  # [P, T, N] fp32
    N,
    V,
    D,
    inner,
    outer,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    LOGITS: tl.constexpr,
    TOP: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    row_tiles = tl.cdiv(N, BLOCK_M)
    column_tiles = tl.cdiv(V, BLOCK_V)
    depth_tiles = tl.cdiv(D, BLOCK_D)
    # Without this the flattened loop is compiled twice, once for D = 0, and spills.
    tl.assume(depth_tiles > 0)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN
    ):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = rows < N
        if FLATTEN:
            # Ahead of the product, under which they arrive: behind it every warp would wait for
            # them. Not where registers are short (sm_100).
            label, anchor = _of_rows(labels_ptr, anchor_ptr, rows, mask)
        products = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for d in range(depth_tiles):
            a = hidden.load([row_tile * BLOCK_M, d * BLOCK_D])
            b = weight.load([column_tile * BLOCK_V, d * BLOCK_D])
            products = multiply_add(a, b.T, products, PRECISION)
        if not FLATTEN:
            label, anchor = _of_rows(labels_ptr, anchor_ptr, rows, mask)
        sums = tile_epilogue(
            products, bias_ptr, out, 0, 0, anchor, label, rows, mask,
            row_tile * BLOCK_M, column_tile * BLOCK_V, V, inner, outer,
            True, CHUNKS, ENTROPY, COLLISION, LOGITS, TOP, EVEN_V,
        )  # fmt: skip
        here = partial_ptr + tl.cast(column_tile, tl.int64) * N + rows
        quantity_stride = tl.cast(column_tiles, tl.int64) * N
        store_sums(here, quantity_stride, mask, sums, ENTROPY, COLLISION, LOGITS, TOP)
