"""LLaMA-Factory's preference trainer, without logits.

Its `CustomDPOTrainer` computes every loss from what its method `concatenated_forward` returns.
`patch()` replaces that method.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.results import LinearLogps
from .batches import IGNORE_INDEX
from .hf import sequence_logps

__all__ = ["concatenated_forward", "patch"]

_AVERAGED = ("ipo", "orpo", "simpo")  # losses of log-probabilities per token


def concatenated_forward(
    self: Any,
    model: nn.Module,
    batch: dict[str, Tensor],  # [2B, T] input_ids, labels, attention_mask, ...
    is_ref_model: bool = False,
) -> dict[str, Tensor]:
    """`CustomDPOTrainer.concatenated_forward` by `fastdpo.integrations.hf.sequence_logps`.

    Args:
        self: the trainer; its loss_type and ld_alpha are read.
        model: policy or reference, in whatever the trainer has wrapped it.
        batch: the B chosen sequences, then the B rejected ones; it is not changed.
        is_ref_model: whether this is the reference, whose log-probabilities `ld_alpha` leaves
            alone.

    Returns:
        chosen_logps, rejected_logps and chosen_logps_avg [B] each, as the trainer's own. In
        chosen_logits and rejected_logits, of which the trainer logs the mean, are the mean logits
        of the tokens that carry loss, one for each; the trainer's own mean is over prompt and
        padding too.

    Raises:
        ValueError: naming the argument; UnsupportedModel as in `sequence_logps`.
    """
    if "labels" not in batch or "input_ids" not in batch:
        checks.fail("batch", "with input_ids and labels", sorted(batch))
    rest: dict[str, Any] = dict(batch)
    input_ids, labels = rest.pop("input_ids"), rest.pop("labels")
    if labels.shape[0] % 2:
        checks.fail("batch", "of whole pairs", f"{labels.shape[0]} sequences")
    tokens = sequence_logps(
        model,
        input_ids,
        labels,
        rest.pop("attention_mask", None),
        per_token=True,
        stats=("mean_logits",),
        **rest,
    )
    tokens = cast(LinearLogps, tokens)
    carries = labels != IGNORE_INDEX
    carries[:, 0] = False  # nothing predicts it
    lengths = carries.sum(-1)
    logps = tokens.logps
    if self.ld_alpha is not None and not is_ref_model:
        logps = logps * _length_weights(carries, lengths, self.ld_alpha)
    sums = logps.sum(-1)
    averages = sums / lengths.clamp(min=1)
    chosen, rejected = (averages if self.loss_type in _AVERAGED else sums).chunk(2)
    mean_logits = cast(Tensor, tokens.mean_logits)
    chosen_logits, rejected_logits = (
        values[at] for values, at in zip(mean_logits.chunk(2), carries.chunk(2), strict=True)
    )
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "chosen_logps_avg": averages.chunk(2)[0],
    }


def _length_weights(
    carries: Tensor,  # [2B, T] bool
    lengths: Tensor,  # [2B]
    ld_alpha: float,
) -> Tensor:  # [2B, T]
    """1 up to the shorter length of a pair, counted in positions from a sequence's first token with
    loss, and `ld_alpha` behind."""
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    end = carries.int().argmax(-1) + shorter
    position = torch.arange(carries.shape[1], device=carries.device)
    return torch.where(position < end[:, None], 1.0, ld_alpha)


def patch() -> None:
    """Replace the method in LLaMA-Factory's trainer; call it before `run_exp`.

    Raises:
        ImportError: there is no LLaMA-Factory with such a trainer.
    """
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    CustomDPOTrainer.concatenated_forward = concatenated_forward
