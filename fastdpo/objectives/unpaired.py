"""Objectives on single answers, each desirable or not, and the detached running terms that they
need.

Every function maps `Unpaired` to one loss per sequence [S], without splitting the batch: the sign y
is +1 for a desirable answer and −1 for an undesirable one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import Unpaired
from .precision import logistic
from .registry import (
    NON_NEGATIVE,
    REQUIRED,
    Option,
    detached,
    number,
    objective,
    scalar,
)

_DESIRABLE = Option(
    "desirable",
    REQUIRED,
    "a bool tensor [S]",
    lambda value: isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() == 1,
    "which sequences are desirable",
)


@objective(
    "kto",
    formula="λ_D · σ(β · (z₀ − h)) if desirable, else λ_U · σ(β · (h − z₀)), z₀ = max(0, kl)",
    paper="Ethayarajh et al. 2024, arXiv 2402.01306",
    options=(
        _DESIRABLE,
        scalar(
            "kl",
            REQUIRED,
            "estimate of KL(π ‖ π_ref) as by kl_estimate, detached; 0.0 leaves it out",
        ),
        number("desirable_weight", 1.0, NON_NEGATIVE, "λ_D"),
        number("undesirable_weight", 1.0, NON_NEGATIVE, "λ_U"),
    ),
    layout="unpaired",
    weightable=False,
)
def kto(
    u: Unpaired,
    *,
    desirable: Tensor,  # [S] bool
    kl: float | Tensor,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """λ_y · (1 − σ(y·β·(h − z₀))): Kahneman-Tversky optimization, Ethayarajh et al. 2024, with the
    reference point z₀ clamped at 0. With kl = 0 it is the unpaired form of apo_zero."""
    estimate = detached(kl)
    reference_point = estimate.clamp(min=0) if isinstance(estimate, Tensor) else max(0.0, estimate)
    value = u.beta * (u.ratios - reference_point)
    good = desirable_weight * logistic(-value)
    bad = undesirable_weight * logistic(value)
    return torch.where(desirable, good, bad)


@objective(
    "bco",
    formula="−log σ(β · h − δ) if desirable, else −ρ · log σ(−(β · h − δ))",
    paper="Jung et al. 2024, arXiv 2404.04656",
    options=(
        _DESIRABLE,
        scalar(
            "delta", REQUIRED, "reward shift δ, detached, e.g. from RunningMean; 0.0 leaves it out"
        ),
        Option(
            "density_ratio",
            None,
            "a floating tensor [S]",
            lambda value: (
                value is None
                or (isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 1)
            ),
            "ρ = p(desirable, x)/p(undesirable, x), read for the undesirable ones; None is 1",
        ),
    ),
    layout="unpaired",
    weightable=False,
)
def bco(
    u: Unpaired,
    *,
    desirable: Tensor,  # [S] bool
    delta: float | Tensor,
    density_ratio: Tensor | None,  # [S]
) -> Tensor:
    """−log σ(y·(β·h − δ)), where undesirable answers are weighted by the density ratio ρ of their
    prompts (underlying distribution matching): binary classifier optimization, Jung et al. 2024."""
    logit = u.beta * u.ratios - detached(delta)
    bad = -F.logsigmoid(-logit)
    if density_ratio is not None:
        bad = density_ratio.detach().to(bad.dtype) * bad
    return torch.where(desirable, -F.logsigmoid(logit), bad)


def kl_estimate(
    logps: Tensor,  # [S] of mismatched answers: each prompt with another's answer
    ref_logps: Tensor,  # [S]
) -> Tensor:  # []
    """KTO's `kl`: the mean log-ratio of answers to other prompts, detached.

    It is not clamped at 0, the objective does that: average it over the ranks of a data-parallel
    group first.
    """
    ratios = (logps - ref_logps).detach()
    return ratios.mean() if ratios.numel() else ratios.sum()


class RunningMean(nn.Module):
    """BCO's δ: the mean of every reward seen so far, as in TRL's trainer.

    The state is two buffers, so it moves with `.to(device)` and is saved with `state_dict()`. In
    evaluation mode (`.eval()`) it is not updated. Nothing synchronizes with the host.

        shift = RunningMean()
        loss = ...(objective="bco", desirable=desirable, delta=shift(beta * (logps - ref_logps)))

    With several data-parallel ranks, gather their rewards before the call.
    """

    mean: Tensor  # []
    count: Tensor  # [] int64

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, rewards: Tensor) -> Tensor:  # any shape -> []
        if self.training and rewards.numel():
            self.count += rewards.numel()
            share = rewards.numel() / self.count.to(self.mean.dtype)
            self.mean += (rewards.detach().to(self.mean.dtype).mean() - self.mean) * share
        return self.mean.clone()
