"""Detached weights that come before an objective: of tokens (LD-DPO) and of sequences (WPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import by_rank


def ld_token_weights(
    lengths: Tensor,  # [S] int64, the tokens of each sequence that carry loss; S = 2B
    positions: Tensor,  # [N] int64, each row's position among the rows of its sequence, from 0
    sequence_ids: Tensor,  # [N] int64, each row's sequence
    ld_alpha: float,
    *,
    pairs: str = "concatenated",
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [N]
    """LD-DPO's weight of every row: 1 within the length that both answers of the pair have,
    ld_alpha beyond.

    The weighted sum over a sequence replaces its log-probability, for the policy and for the
    reference alike (Liu et al. 2024, arXiv 2409.06411).
    """
    shared = by_rank(lengths, 2, pairs).amin(0)  # [B]
    shared = (
        torch.stack([shared, shared], 1).flatten() if pairs == "interleaved" else shared.repeat(2)
    )
    inside = positions < shared.index_select(0, sequence_ids)
    one = torch.ones((), dtype=dtype, device=inside.device)
    return torch.where(inside, one, one * ld_alpha)


@torch.no_grad()
def wpo_weights(
    logps: Tensor,  # [N] log-probabilities of the labels
    log_sum_sq_probs: Tensor,  # [N] log Σ_v p_v² of each row
    offsets: Tensor,  # [S + 1] int64, sequence s owns the rows offsets[s]:offsets[s + 1]
    lengths: Tensor | None = None,  # [S] its rows that carry loss; None: all of them
) -> Tensor:  # [S]
    """WPO's weight of every sequence, the geometric mean of p(label) / Σ_v p_v² over its tokens,
    detached.

    It says how much on-policy an answer is; a pair's loss is multiplied by the product of its two
    weights (Zhou et al. 2024, arXiv 2406.11827, equation 2 with the paper's weight alignment, in
    TRL's length-normalized form). An empty sequence has weight 1. Rows that carry no loss are 0 in
    both tensors.
    """
    rows = offsets.diff()
    lengths = rows if lengths is None else lengths
    aligned = (logps - log_sum_sq_probs).double()
    if aligned.numel() == 0:
        return logps.new_ones(rows.shape)
    sums = torch.segment_reduce(aligned, "sum", lengths=rows, unsafe=True, initial=0)
    return torch.exp(sums / lengths.clamp(min=1)).to(logps.dtype)
