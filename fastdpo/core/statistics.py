"""The statistics of a row, of its sums: entropy, log Σ p², the mean logit, whether the label is
first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import COLLISION_SHIFT, ExpSums, Head
from ..backends.workspace import sum_rows
from .call import Call
from .row_state import FAR, RowState


def statistic(
    name: str,
    x: Tensor,
    labels: Tensor,  # [N] of the whole vocabulary
    head: Head,
    state: RowState,
    sums: ExpSums,
    logps: Tensor,
    call: Call,
) -> Tensor:
    delta = state.anchor - state.target
    if name == "entropy" and sums.entropy is not None:
        # −Σ p log p with every logit taken from the label's (near) or from the anchor (far): no
        # large numbers cancel.
        near = -logps - state.inverse * (sums.entropy + delta * state.sum)
        # p log p is 0 at p = 0: the largest number for ∞, so that ∞ · 0 is taken nowhere.
        finite = delta.clamp_max(torch.finfo(delta.dtype).max)
        own = finite * torch.exp(-finite)
        far = -torch.log(state.inverse) - state.inverse * (sums.entropy - own)
        return torch.where(delta <= FAR, near, far).clamp_min_(0.0)
    if name == "log_sum_sq_probs" and sums.collision is not None:
        own = torch.exp(2.0 * (COLLISION_SHIFT - delta))
        return (
            torch.log(sums.collision + own) - 2.0 * COLLISION_SHIFT + 2.0 * torch.log(state.inverse)
        )
    if name == "mean_logits":
        if sums.logits is not None:  # asked for where there is a softcap
            return (sums.logits + state.target) / call.vocab_size(head)
        mean = torch.cat([weight.mean(0, dtype=logps.dtype) for weight in head.weights])
        # Not a matrix-vector product, which sums a row in an order that depends on the others.
        few = sum_rows(x)
        u = torch.cat([(part.to(logps.dtype) * mean).sum(-1) for part in x.split(few)])
        mean = head.gain * (u if head.bias is None else u + head.bias.mean(dtype=logps.dtype))
        if call.vocab_parallel is None:
            return mean
        return call.vocab_parallel.total(mean * (head.vocab_size / call.vocab_size(head)))
    assert name == "is_top1"
    assert sums.top is not None
    assert sums.own is not None
    assert sums.earlier is not None
    first = (sums.own >= sums.top) & (sums.own > sums.earlier)
    # Where nothing can occur all logits are equal, and the vocabulary's first entry is the first.
    nothing = torch.maximum(sums.own, sums.top) == -torch.inf
    return torch.where(nothing, labels == 0, first)


def tolerance_of(
    x: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
    target: Tensor,  # [N] the labels' logits
    call: Call,
) -> Tensor:  # [N]
    """By how much two sums of the label's logit may differ: one rounding of Σ |h w| for each of D
    terms, and where fp32 is multiplied with fewer bits, what these leave out.
    """
    size = torch.empty_like(target)
    inside = labels.clamp(0, head.vocab_size - 1)
    block = sum_rows(x)
    for start in range(0, x.shape[0], block):
        rows = slice(start, start + block)
        parts = (
            weight.index_select(0, inside[rows]).to(size.dtype).mul_(part).abs_().sum(-1)
            for part, weight in head.parts(x[rows])
        )
        size[rows] = sum(parts)
    if call.vocab_parallel is not None:
        size = call.vocab_parallel.from_owner(size, labels)
    eps = torch.finfo(size.dtype).eps
    relative = 2 * eps * x.shape[1]
    library = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    if x.dtype == torch.float32:
        relative += {"tf32": 2.0**-9, "bf16": 2.0**-6}.get(library.matmul.fp32_precision, 0.0)
    return relative * abs(head.gain) * size + 16 * eps * target.abs()
