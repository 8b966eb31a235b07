"""logits_logps' backward: one read and one write per logit, in place when asked.

    ∂loss/∂logits_tv = grad_t · gain · slope_tv · (1[v = y_t] − exp(z_tv − lse_t))

Bytes: 2·s·N·V, or s·N·V for rows that carry no loss, which are written as zeros without being read;
about 8 operations per logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import exponential, head_curve, times_slope


@triton.jit
def logits_logps_backward_kernel(
    grad_ptr,  # [N] fp32
    logits_ptr,  # [N, V]
    labels_ptr,  # [N] int
    lse_ptr,  # [N, 2] fp32, the forward's
    out_ptr,  # [N, V], may be logits_ptr
    row_stride,
    column_stride,
    out_row_stride,
    out_column_stride,
    V,
    inner,
    outer,
    gain,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < V
    wide = columns.to(tl.int64)
    out = out_ptr + row * out_row_stride + wide * out_column_stride
    label = tl.load(labels_ptr + row).to(tl.int32)
    if label < 0:
        tl.store(out, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), mask=mask)
        return
    u = tl.load(logits_ptr + row * row_stride + wide * column_stride, mask=mask, other=0.0)
    t, factor = head_curve(u.to(tl.float32), inner, outer)
    # Not one fma: z is rounded as the forward rounded it, so that probability 1 is exactly 1. And
    # the largest logit goes first, which is exact where z is close to it.
    p = exponential((t * factor - tl.load(lse_ptr + 2 * row)) - tl.load(lse_ptr + 2 * row + 1))
    grad = tl.where(columns == label, 1.0 - p, -p) * (tl.load(grad_ptr + row) * gain)
    tl.store(out, times_slope(grad, t, outer).to(out_ptr.dtype.element_ty), mask=mask)
