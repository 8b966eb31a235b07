"""What comes back, defined once: of tokens here, of sequences in `fastdpo.objectives`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..objectives import LinearDPOOutput

__all__ = ["LinearDPOOutput", "LinearDPOStats", "LinearLogps"]


class LinearLogps(NamedTuple):
    """Per-token results; None where not asked for.

    From the public functions each is shaped like the labels, and exactly 0 (False) at ignored
    positions; inside, each is [N], of the rows that carry loss.
    """

    logps: Tensor
    entropy: Tensor | None = None  # −Σ_v p_v log p_v, nats
    log_sum_sq_probs: Tensor | None = None  # log Σ_v p_v²
    mean_logits: Tensor | None = None  # (1/V) Σ_v z_v
    is_top1: Tensor | None = None  # bool: is the label the first maximum of the logits?


class LinearDPOStats(NamedTuple):
    """What `linear_dpo_loss` returns with `stats`: the fields of LinearDPOOutput, and `tokens`."""

    loss: Tensor  # []
    chosen_logps: Tensor  # [B]
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B], detached
    rejected_rewards: Tensor  # [B], detached
    tokens: LinearLogps  # detached, each shaped like labels
