"""logits_logps: materialized logits read once, by an online log-sum-exp.

One program per row keeps the running maximum as one number and the sum as a vector that is added up
at the end. Two blocks are on their way while one is worked on: five programs of four warps (96
registers) keep 80 KB in flight per processor of an H200, which needs about 30. That is so where V
is a multiple of 16. Rows of other vocabularies begin at any address, and a row's additions may not
depend on where: they are read element by element, with nothing on its way meanwhile.

Bytes: s·V per row that carries loss (s = 2 or 4 bytes per logit), nothing for the others; about 10
operations per logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import exponential, head_curve

_STAGES = tl.constexpr(3)  # of the loop over a row's blocks


@triton.jit
def _absorb(
    z,  # [BLOCK_V] fp32: the next logits
    top,  # [1] the largest so far
    total,  # [BLOCK_V] Σ exp(z − top) so far, lane by lane
):
    higher = tl.maximum(top, tl.max(z, 0))
    # While every logit so far is −inf there is nothing to rescale, and −inf − (−inf) would be NaN.
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, tl.fma(total, exponential(top - anchor), exponential(z - anchor))


@triton.jit
def logits_logps_kernel(
    logits_ptr,  # [N, V]
    labels_ptr,  # [N] int
    logps_ptr,  # [N] fp32
    lse_ptr,  # [N, 2] fp32: the largest logit, and log Σ exp(z − that)
    row_stride,
    column_stride,
    V,
    inner,
    outer,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label < 0:
        tl.store(logps_ptr + row, 0.0)
        tl.store(lse_ptr + 2 * row, 0.0)
        tl.store(lse_ptr + 2 * row + 1, 0.0)
        return
    logits = logits_ptr + row * row_stride
    one = tl.arange(0, 1)
    own, factor = head_curve(
        tl.load(logits + (label + one) * column_stride).to(tl.float32), inner, outer
    )
    own *= factor
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=_STAGES):
        columns = start + tl.arange(0, BLOCK_V)
        u = tl.load(logits + columns.to(tl.int64) * column_stride)
        t, factor = head_curve(u.to(tl.float32), inner, outer)
        top, total = _absorb(t * factor, top, total)
    if whole < V:  # the only block that needs a mask
        columns = whole + tl.arange(0, BLOCK_V)
        mask = columns < V
        u = tl.load(logits + columns.to(tl.int64) * column_stride, mask=mask, other=0.0)
        t, factor = head_curve(u.to(tl.float32), inner, outer)
        top, total = _absorb(tl.where(mask, t * factor, float("-inf")), top, total)
    log_total = tl.log(tl.sum(tl.reshape(total, (1, BLOCK_V)), 1))
    tl.store(lse_ptr + 2 * row + one, top)
    tl.store(lse_ptr + 2 * row + 1 + one, log_total)
    # (z_y − max) − log Σ rather than z_y − lse: the first difference is exact where they are close.
    tl.store(logps_ptr + row + one, (own - top) - log_total)
