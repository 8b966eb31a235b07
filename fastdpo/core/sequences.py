"""Token log-probabilities to sequence log-probabilities, and the fused sigmoid loss on top of them.

Rows belong to sequences in order: sequence s owns lengths[s] consecutive rows. Sums have a fixed
order, so that neither padding nor the rest of the batch can change a bit of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import select
from ..backends.torch import sequence_sums as _sums
from .autograd import differentiable_once


@dataclass(frozen=True)
class Segments:
    """Which rows belong to which sequence.

    Outside of torch.compile every row carries loss; inside it all M positions are rows, and
    `carries` tells.
    """

    rows: Tensor  # [S] consecutive rows of each sequence
    lengths: Tensor  # [S] how many of them carry loss
    carries: Tensor | None = None  # [N] bool; None where all do

    def average(self, sums: Tensor) -> Tensor:  # [S] -> [S]
        return sums / self.lengths.clamp(min=1)

    def masked(self, values: Tensor) -> Tensor:  # [N] -> [N]
        """0 where every row is there and one carries no loss: what was given may be anything."""
        return values if self.carries is None else torch.where(self.carries, values, 0.0)

    def positions(self, total: int) -> tuple[Tensor, Tensor]:  # [N], [N]
        """The sequence of each row, and its position among that sequence's rows that carry loss."""
        sequence = torch.arange(self.rows.numel(), device=self.rows.device)
        sequence = sequence.repeat_interleave(self.rows, output_size=total)
        if self.carries is None:
            before = torch.arange(total, device=self.rows.device)
        else:
            before = self.carries.cumsum(0) - 1
        return sequence, before - offsets_of(self.lengths)[sequence]


def sequence_sums(
    logps: Tensor,  # [N]
    lengths: Tensor,  # [S]
) -> Tensor:  # [S]
    """Σ_t logp_t of each sequence; 0 for one without rows."""
    return _SequenceSums.apply(logps, lengths)


def sigmoid_loss(
    logps: Tensor,  # [N]
    lengths: Tensor,  # [2B]
    ref_logps: Tensor | None,  # [2B]
    *,
    beta: float,
    label_smoothing: float,
    average: bool,
    pairs: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO sigmoid loss [], the sequences' log-probabilities [2B] and their rewards [2B]
    (detached).
    """
    offsets = offsets_of(lengths)
    if ref_logps is None:
        ref_logps = logps.new_zeros(lengths.shape)
    return _SigmoidLoss.apply(
        logps, offsets, ref_logps.detach(), beta, label_smoothing, average, pairs, backend
    )


def offsets_of(lengths: Tensor) -> Tensor:  # [S] -> [S + 1]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(lengths)
        ctx.rows = logps.shape[0]
        return _sums(logps, lengths)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (lengths,) = ctx.saved_tensors
        return _to_rows(grad, lengths, ctx.rows), None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, offsets, ref_logps, beta, label_smoothing, average, pairs, backend):
        ctx.set_materialize_grads(False)
        module = select.primitive("sequence_loss", logps, backend)
        result = module.sequence_loss(
            logps, offsets, ref_logps.to(logps.dtype), beta, label_smoothing, average, pairs
        )
        ctx.save_for_backward(offsets, result.coefficients)
        ctx.rows, ctx.average = logps.shape[0], average
        ctx.mark_non_differentiable(result.rewards)
        return result.loss, result.logps, result.rewards

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, grad_logps, _grad_rewards):
        offsets, coefficients = ctx.saved_tensors
        lengths = offsets.diff()
        per_token = torch.zeros_like(coefficients)
        if grad_loss is not None:
            per_token = coefficients * grad_loss
        if grad_logps is not None:
            count = lengths.clamp(min=1).to(grad_logps.dtype)
            per_token = per_token + (grad_logps / count if ctx.average else grad_logps)
        return _to_rows(per_token, lengths, ctx.rows), *(None,) * 7


def _to_rows(values: Tensor, lengths: Tensor, rows: int) -> Tensor:  # [S], [S] -> [N]
    return values.repeat_interleave(lengths, output_size=rows)
