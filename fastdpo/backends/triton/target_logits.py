"""target_logits: the label's own logit, a gather and a dot.

One program per row. Operations: 2·N·D. Bytes, for 16-bit inputs: 2·N·D of hidden and at most 2·N·D
of the weight's rows, however large V is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import head_curve


@triton.jit
def target_logits_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V] or None
    labels_ptr,  # [N] int
    logit_ptr,  # [N] fp32
    hidden_stride,
    weight_stride,
    weight_depth_stride,
    V,
    D,
    inner,
    outer,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if (label < 0) | (label >= V):
        # The label lies in another tile of the vocabulary and adds nothing to this one.
        tl.store(logit_ptr + row, 0.0)
        return
    hidden = hidden_ptr + row * hidden_stride
    weight = weight_ptr + label * weight_stride
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        mask = depth < D
        h = tl.load(hidden + depth, mask=mask, other=0.0).to(tl.float32)
        place = weight + depth.to(tl.int64) * weight_depth_stride
        total = tl.fma(h, tl.load(place, mask=mask, other=0.0).to(tl.float32), total)
    # A tile of one element rather than a scalar: the exponential is written for tiles.
    u = tl.sum(tl.reshape(total, (1, BLOCK_D)), 1)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + label).to(tl.float32)
    t, factor = head_curve(u, inner, outer)
    tl.store(logit_ptr + row + tl.arange(0, 1), t * factor)
