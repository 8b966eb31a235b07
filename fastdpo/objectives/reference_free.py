"""Objectives on pairs without a reference model. A reference given to them is an error: it costs a
forward pass and would change nothing.

In the formulae a = log π / n is the log-probability per token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import Pairs
from .paired import smoothed_logistic
from .registry import (
    NON_NEGATIVE,
    SMOOTHING,
    Option,
    number,
    objective,
)


def _is_ratio(value: object) -> bool:
    return value is None or value in NON_NEGATIVE


@objective(
    "simpo",
    formula="sigmoid's, of z = β · (a_w − a_l) − γ",
    paper="Meng et al. 2024, arXiv 2405.14734",
    options=(
        Option(
            "gamma",
            0.5,
            "a number in [0, ∞)",
            NON_NEGATIVE.__contains__,
            "target margin γ of the reward",
        ),
        Option(
            "gamma_beta_ratio",
            None,
            "a number in [0, ∞)",
            _is_ratio,
            "γ/β, as the authors' code has it, in place of gamma",
        ),
    ),
    reference="refused",
    label_smoothing=SMOOTHING,
    average_rewards=True,
)
def simpo(p: Pairs, *, gamma: float, gamma_beta_ratio: float | None) -> Tensor:
    """−log σ(β·(a_w − a_l) − γ) on log-probabilities per token: equation 6 of Meng et al. 2024. The
    margin is given as γ itself (TRL's `simpo_gamma`) or as γ/β."""
    margin = gamma if gamma_beta_ratio is None else gamma_beta_ratio * p.beta
    z = p.beta * (p.chosen_averages - p.rejected_averages) - margin
    return smoothed_logistic(z, p.label_smoothing)


@objective(
    "cpo",
    formula="sigmoid's, of z = β · (log π_w − log π_l), plus α · NLL_w with α = cpo_alpha",
    paper="Xu et al. 2024, arXiv 2401.08417",
    options=(number("cpo_alpha", 1.0, NON_NEGATIVE, "weight of the chosen answers' NLL"),),
    reference="refused",
    label_smoothing=SMOOTHING,
    nll_weight="cpo_alpha",
)
def cpo(p: Pairs, *, cpo_alpha: float) -> Tensor:
    """−log σ(β·(log π_w − log π_l)), beside α times the NLL of the chosen answers, which the caller
    adds: contrastive preference optimization, Xu et al. 2024."""
    return smoothed_logistic(p.beta * (p.chosen_logps - p.rejected_logps), p.label_smoothing)


def _log_odds(
    logps: Tensor,  # [B] at most 0
    lengths: Tensor,  # [B]
    dtype: torch.dtype,  # that the log-probabilities came in
) -> Tensor:  # [B]
    """log(p / (1 − p)) for p = e^a, a = logps / lengths.

    Only a = 0 is singular. A log-probability of 0 stands for what `dtype` cannot tell from it, and
    counts as the largest number below (log-odds of 103 for a token in fp32, 708 in fp64); its
    gradient is 0.
    """
    kind, wide = torch.finfo(dtype), torch.finfo(logps.dtype)
    a = logps.clamp(max=-kind.smallest_normal * kind.eps) / lengths
    a = a.clamp(max=-wide.smallest_normal)
    # log(1 − e^a): each form is accurate on its side of a = −log 2, and is asked only there.
    split = -math.log(2.0)
    near = torch.log(-torch.expm1(a.clamp(min=split)))
    far = torch.log1p(-torch.exp(a.clamp(max=split)))
    return a - torch.where(a > split, near, far)


@objective(
    "orpo",
    formula="NLL_w − β · log σ(log odds_w − log odds_l) with odds = eᵃ/(1 − eᵃ)",
    paper="Hong et al. 2024, arXiv 2403.07691",
    reference="refused",
    average_rewards=True,
    nll_weight=1.0,
)
def orpo(p: Pairs) -> Tensor:
    """−β·log σ(log odds_w − log odds_l) on probabilities per token, beside the NLL of the chosen
    answers, which the caller adds: odds-ratio preference optimization, equations 4 and 7 of Hong et
    al. 2024. β is the paper's λ."""
    chosen = _log_odds(p.chosen_logps, p.chosen_lengths, p.dtype)
    rejected = _log_odds(p.rejected_logps, p.rejected_lengths, p.dtype)
    return -p.beta * F.logsigmoid(chosen - rejected)
