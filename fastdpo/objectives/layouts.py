"""What goes into an objective and what comes out, and the three ways in which sequences are laid
out.

    pairs      S = 2B sequences, a chosen and a rejected answer to each of B prompts
    ranked     S = K·B sequences, K answers to each of B prompts, best first
    unpaired   S sequences, each desirable or not

"concatenated" keeps the sequences of one rank together (all chosen, then all rejected),
"interleaved" those of one prompt (chosen, rejected, chosen, rejected, ...). Pairs are rankings with
K = 2.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import FDivergence
from .precision import widened

PAIRS = ("concatenated", "interleaved")


@dataclass(frozen=True)
class SequenceLogps:
    """What an objective sees of a batch of S sequences. fp32 or fp64.

    `averaged` says that `logps` and `ref_logps` are averages over a sequence's tokens already, so
    that objectives which normalize by length do not divide again.
    """

    logps: Tensor  # [S] the policy's sequence log-probabilities, sums over tokens (or averages)
    ref_logps: Tensor | None  # [S] the reference's, or None where there is no reference
    lengths: Tensor  # [S] int64, how many tokens of each sequence carry loss
    weights: Tensor | None = None  # [S] detached WPO weights
    nll: Tensor | None = (
        None  # [] NLL of the chosen answers, the mean over their tokens, differentiable
    )
    pairs: str = "concatenated"  # among PAIRS
    averaged: bool = False
    num_pairs: float | Tensor | None = None  # what the sum of losses is divided by; None: B


class LinearDPOOutput(NamedTuple):
    """What an objective returns, and every loss that ends in one; B is the number of pairs, prompts
    or sequences of a kind.

    `chosen_*` and `rejected_*` are, for pairs, the chosen and rejected answers [B] each; for
    rankings the best answers [B] and all others [(K − 1)·B], the second-best of every prompt first;
    for unpaired sequences the desirable and the undesirable ones.
    """

    loss: Tensor  # [] the mean over pairs, prompts or sequences; differentiable
    chosen_logps: Tensor  # [B] differentiable
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B] detached: beta · (logps − ref_logps), or beta · logps without one
    rejected_rewards: Tensor  # [B], detached


ObjectiveOutput = LinearDPOOutput


@dataclass(frozen=True)
class Pairs:
    """What the function of a "pairs" objective sees. Without a reference, ref_logps are 0.

    `*_ratios` are the log-ratios h = logps − ref_logps; `*_scores` are f'(e^h) of the f-divergence,
    which for the default, the reverse KL, is h itself.
    """

    chosen_logps: Tensor  # [B]
    rejected_logps: Tensor  # [B]
    chosen_ref_logps: Tensor  # [B]
    rejected_ref_logps: Tensor  # [B]
    chosen_ratios: Tensor  # [B]
    rejected_ratios: Tensor  # [B]
    chosen_scores: Tensor  # [B]
    rejected_scores: Tensor  # [B]
    chosen_lengths: Tensor  # [B] at least 1; exactly 1 where logps are averages already
    rejected_lengths: Tensor  # [B]
    nll: Tensor | None  # []
    beta: float
    label_smoothing: float
    dtype: torch.dtype  # that the log-probabilities came in; here they are fp64

    @classmethod
    def of(
        cls,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        chosen_ref_logps: Tensor,
        rejected_ref_logps: Tensor,
        *,
        beta: float,
        label_smoothing: float = 0.0,
    ) -> Pairs:
        """Plain ones, of any one shape: no f-divergence, every length 1, no NLL. Widened."""
        given = (chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
        dtype = functools.reduce(torch.promote_types, (logps.dtype for logps in given))
        chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps = map(widened, given)
        ratios = (chosen_logps - chosen_ref_logps, rejected_logps - rejected_ref_logps)
        return cls(
            chosen_logps,
            rejected_logps,
            chosen_ref_logps,
            rejected_ref_logps,
            *ratios,
            *ratios,
            torch.ones_like(chosen_logps),
            torch.ones_like(rejected_logps),
            None,
            beta,
            label_smoothing,
            dtype,
        )

    @property
    def margin(self) -> Tensor:
        """[B] chosen minus rejected score."""
        return self.chosen_scores - self.rejected_scores

    @property
    def average_margin(self) -> Tensor:
        """[B] the same per token."""
        return (
            self.chosen_scores / self.chosen_lengths - self.rejected_scores / self.rejected_lengths
        )

    @property
    def chosen_averages(self) -> Tensor:
        """[B] log-probability per token."""
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_averages(self) -> Tensor:
        return self.rejected_logps / self.rejected_lengths


@dataclass(frozen=True)
class Ranked:
    """What the function of a "ranked" objective sees."""

    ratios: Tensor  # [K, B] log-ratios, best first
    beta: float


@dataclass(frozen=True)
class Unpaired:
    """What the function of an "unpaired" objective sees."""

    ratios: Tensor  # [S] log-ratios
    beta: float


def by_rank(
    values: Tensor,  # [K·B]
    ranks: int,
    pairs: str,
) -> Tensor:  # [K, B], a view
    if pairs == "interleaved":
        return values.view(values.shape[0] // ranks, ranks).t()
    return values.view(ranks, values.shape[0] // ranks)


def token_counts(sequences: SequenceLogps) -> Tensor:  # [S]
    """What to divide by for averages per token: at least 1, so that empty sequences give 0, never
    NaN."""
    if sequences.averaged:
        return torch.ones_like(sequences.logps)
    return sequences.lengths.clamp(min=1).to(sequences.logps.dtype)


def as_pairs(
    sequences: SequenceLogps,
    beta: float,
    label_smoothing: float,
    divergence: FDivergence | None,
    dtype: torch.dtype,
) -> Pairs:
    logps = sequences.logps
    ref_logps = (
        torch.zeros_like(logps) if sequences.ref_logps is None else sequences.ref_logps.detach()
    )
    ratios = logps - ref_logps
    scores = ratios if divergence is None else divergence(ratios)
    chosen_logps, rejected_logps = by_rank(logps, 2, sequences.pairs)
    chosen_ref_logps, rejected_ref_logps = by_rank(ref_logps, 2, sequences.pairs)
    chosen_ratios, rejected_ratios = by_rank(ratios, 2, sequences.pairs)
    chosen_scores, rejected_scores = by_rank(scores, 2, sequences.pairs)
    chosen_lengths, rejected_lengths = by_rank(token_counts(sequences), 2, sequences.pairs)
    return Pairs(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_ref_logps=chosen_ref_logps,
        rejected_ref_logps=rejected_ref_logps,
        chosen_ratios=chosen_ratios,
        rejected_ratios=rejected_ratios,
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        nll=sequences.nll,
        beta=beta,
        label_smoothing=label_smoothing,
        dtype=dtype,
    )


def log_ratios(sequences: SequenceLogps) -> Tensor:  # [S]
    if sequences.ref_logps is None:
        return sequences.logps
    return sequences.logps - sequences.ref_logps.detach()
