"""The partial sums of all vocabulary tiles -> one number per row; flags; the label's entry of E.

Operations: P·T·N additions, where P is the number of quantities and T = ⌈V / BLOCK_V⌉ (501 for a
vocabulary of 128,256 in 256 columns). Bytes: 4·P·T·N read, 0.8 % of E's per quantity, and
4·P·N + 9·N for the sums, the anchors and the flags; what is only for flagged rows reads N flags and
ends. None of it depends on D. A row's order of additions depends on T alone, so neither on N nor on
its place in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contract import REANCHOR_ABOVE

_REANCHOR_ABOVE = tl.constexpr(REANCHOR_ABOVE)


@triton.jit(do_not_specialize=["N", "T"])
def reduce_sums(
    partial_ptr,  # [P, T, N] fp32
    sums_ptr,  # [P, N] fp32
    reanchored_ptr,  # [N] int8 or None
    anchor_ptr,  # [N] fp32, copied to new_anchor, or None
    new_anchor_ptr,  # [N] fp32 or None
    label_logit_ptr,  # [N] fp32: to be taken from Σ z (0 where the label is elsewhere), or None
    entry_ptr,  # [N] fp32 or None
    labels_ptr,  # [N] int
    out_ptr,  # [N, K] or None
    out_stride,
    K,
    N,
    T,
    QUANTITIES: tl.constexpr,
    LOGITS_AT: tl.constexpr,  # which quantity is Σ z, or -1
    TOP_AT: tl.constexpr,  # which quantity is a maximum, or -1
    AGAIN: tl.constexpr,  # only the rows that are flagged, rather than flagging them
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < N
    if AGAIN:
        mask = tl.load(reanchored_ptr + rows, mask=mask, other=0).to(tl.int32) > 0
        if tl.max(mask.to(tl.int32), 0) == 0:
            return
    for q in tl.static_range(QUANTITIES):
        if q == TOP_AT:
            result = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        else:
            result = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, T, BLOCK_T):
            tiles = start + tl.arange(0, BLOCK_T)
            place = (
                partial_ptr
                + (tiles.to(tl.int64) + q * tl.cast(T, tl.int64))[:, None] * N
                + rows[None, :]
            )
            inside = (tiles < T)[:, None] & mask[None, :]
            if q == TOP_AT:
                part = tl.load(place, mask=inside, other=float("-inf"))
                result = tl.maximum(result, tl.max(part, 0))
            else:
                result += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
        if q == LOGITS_AT:
            result -= tl.load(label_logit_ptr + rows, mask=mask, other=0.0)
        tl.store(sums_ptr + tl.cast(q, tl.int64) * N + rows, result, mask=mask)
        if (q == 0) and (reanchored_ptr is not None) and not AGAIN:
            # Written so that NaN and inf are flagged too.
            overflowed = tl.where(result <= _REANCHOR_ABOVE, 0, 1).to(tl.int8)
            tl.store(reanchored_ptr + rows, overflowed, mask=mask)
    if anchor_ptr is not None:
        tl.store(new_anchor_ptr + rows, tl.load(anchor_ptr + rows, mask=mask), mask=mask)
    if entry_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=mask, other=-1)
        entry = tl.load(entry_ptr + rows, mask=mask, other=0.0).to(out_ptr.dtype.element_ty)
        place = out_ptr + rows.to(tl.int64) * out_stride + label
        tl.store(place, entry, mask=mask & (label >= 0) & (label < K))
