"""Whether the label is the first maximum of its row's logits, where the product cannot say.

A product sums the label's own logit and those of equal entries in orders of its own, and another
kernel in others. Here the label's logit is summed once more for every row, and for a row whose
largest other logit lies within the tolerance of it, all entries of the vocabulary tiles that come
so close: all of them in one order, so that equal entries are equal to the bit.

One row in a hundred is close, as a rule, and of one tile. SPLITS programs share a row's columns.
Operations: 2·N·D, and for each close tile 2·BLOCK_V·D; bytes, for 16-bit inputs: 4·N·D and
2·BLOCK_V·D, and 4·SPLITS·T·N of the tiles' maxima for close rows alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import head_curve

_NO_LOGIT = tl.constexpr(float("-inf"))
# A label this far below the maximum is not its equal, whatever the tolerance.
_FAR = tl.constexpr(32.0)


@triton.jit
def _logits(
    hidden,  # pointer to a row
    weight_ptr,
    bias_ptr,
    weight_stride,
    weight_depth_stride,
    columns,  # [C], in [0, V)
    D,
    inner,
    outer,
    BLOCK_D: tl.constexpr,
):
    """z [C] of a row; every entry's sum is taken in the same order."""
    weight = weight_ptr + columns.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((columns.shape[0], BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        mask = depth < D
        h = tl.load(hidden + depth, mask=mask, other=0.0).to(tl.float32)
        place = weight + depth.to(tl.int64)[None, :] * weight_depth_stride
        w = tl.load(place, mask=mask[None, :], other=0.0).to(tl.float32)
        total = tl.fma(tl.broadcast_to(h[None, :], total.shape), w, total)
    u = tl.sum(total, 1)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + columns).to(tl.float32)
    t, factor = head_curve(u, inner, outer)
    return t * factor


@triton.jit(do_not_specialize=["N", "T"])
def settle_ties(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V] or None
    labels_ptr,  # [N] int
    anchor_ptr,  # [N] fp32, the labels' logits, wherever they lie
    tolerance_ptr,  # [N] fp32
    top_ptr,  # [N] fp32
    maxima_ptr,  # [T, N] fp32, of the vocabulary tiles
    own_ptr,  # [N] fp32, written
    settled_ptr,  # [2 · SPLITS, N] fp32, written: top and earlier
    hidden_stride,
    weight_stride,
    weight_depth_stride,
    N,
    V,
    D,
    T,
    inner,
    outer,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    hidden = hidden_ptr + row.to(tl.int64) * hidden_stride
    label = tl.load(labels_ptr + row).to(tl.int32)
    if split == 0:
        own = tl.full((BLOCK_C,), _NO_LOGIT, tl.float32)
        if (label >= 0) & (label < V):
            own = _logits(
                hidden, weight_ptr, bias_ptr, weight_stride, weight_depth_stride,
                label + tl.zeros((BLOCK_C,), tl.int32), D, inner, outer, BLOCK_D,
            )  # fmt: skip
        tl.store(own_ptr + row, tl.max(own, 0))
    anchor = tl.load(anchor_ptr + row)
    tolerance = tl.minimum(tl.load(tolerance_ptr + row), _FAR)
    top = tl.full((BLOCK_C,), _NO_LOGIT, tl.float32)
    earlier = tl.full((BLOCK_C,), _NO_LOGIT, tl.float32)
    if tl.abs(anchor - tl.load(top_ptr + row)) <= tolerance:
        for tile in range(T):
            if tl.load(maxima_ptr + tl.cast(tile, tl.int64) * N + row) >= anchor - tolerance:
                for first in range(split * BLOCK_C, BLOCK_V, SPLITS * BLOCK_C):
                    columns = tile * BLOCK_V + first + tl.arange(0, BLOCK_C)
                    z = _logits(
                        hidden, weight_ptr, bias_ptr, weight_stride, weight_depth_stride,
                        tl.minimum(columns, V - 1), D, inner, outer, BLOCK_D,
                    )  # fmt: skip
                    counts = (columns < V) & (columns != label)
                    z = tl.where(counts, z, _NO_LOGIT)
                    top = tl.maximum(top, z)
                    earlier = tl.maximum(earlier, tl.where(columns < label, z, _NO_LOGIT))
    here = settled_ptr + tl.cast(split, tl.int64) * N + row
    tl.store(here, tl.max(top, 0))
    tl.store(here + tl.cast(SPLITS, tl.int64) * N, tl.max(earlier, 0))
