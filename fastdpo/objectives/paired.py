"""Objectives on pairs of a chosen and a rejected answer, with a reference model.

Every function maps `Pairs` to one loss per pair [B]. In the formulae w is the chosen answer and l
the rejected one, h = log π/π_ref, s the score (h, unless an f-divergence is asked for), n the
number of tokens, σ the logistic function, ε the label smoothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import Pairs
from .precision import exp, logistic
from .registry import (
    FINITE,
    NON_NEGATIVE,
    POSITIVE,
    REQUIRED,
    SMOOTHING,
    Option,
    Range,
    detached,
    flag,
    number,
    objective,
    scalar,
)


def smoothed_logistic(
    logits: Tensor,  # [B]
    label_smoothing: float,
) -> Tensor:  # [B]
    """−(1 − ε) · log σ(z) − ε · log σ(−z)."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(logits)
    kept = (1.0 - label_smoothing) * F.logsigmoid(logits)
    return -kept - label_smoothing * F.logsigmoid(-logits)


@objective(
    "sigmoid",
    formula="−(1 − ε) · log σ(β · (s_w − s_l)) − ε · log σ(−β · (s_w − s_l))",
    paper="Rafailov et al. 2023, arXiv 2305.18290; ε > 0 is cDPO, Mitchell 2023",
    reference="optional",
    label_smoothing=SMOOTHING,
    f_divergence="composes",
)
def sigmoid(p: Pairs) -> Tensor:
    """DPO: −log σ(β · (s_w − s_l)). With label smoothing ε, labels are taken to be flipped with
    probability ε (cDPO). Rafailov et al. 2023, equation 7."""
    return smoothed_logistic(p.beta * p.margin, p.label_smoothing)


@objective(
    "hinge",
    formula="max(0, 1 − β · (s_w − s_l))",
    paper="Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425; Liu et al. 2023 (RSO), arXiv 2309.06657",
    reference="optional",
    f_divergence="composes",
)
def hinge(p: Pairs) -> Tensor:
    """max(0, 1 − β · (s_w − s_l)): SLiC's hinge on the log-ratios, as RSO normalizes it."""
    return torch.relu(1.0 - p.beta * p.margin)


@objective(
    "ipo",
    formula="(s_w − s_l − 1/(2β))², or (s_w/n_w − s_l/n_l − 1/(2β))² if length_normalized",
    paper="Azar et al. 2023, arXiv 2310.12036",
    options=(
        flag(
            "length_normalized",
            False,
            "log-ratios per token, as in TRL; off is the paper's formula",
        ),
    ),
    reference="optional",
    f_divergence="composes",
)
def ipo(p: Pairs, *, length_normalized: bool) -> Tensor:
    """(s_w − s_l − 1/(2β))²: equation 17 of Azar et al. 2023, where β is called τ. TRL uses
    averages per token in place of sums (`length_normalized=True`)."""
    return ((p.average_margin if length_normalized else p.margin) - 0.5 / p.beta).square()


@objective(
    "exo_pair",
    formula="q · (log q − log(1 − ε)) + (1 − q) · (log(1 − q) − log ε) with q = σ(β · (s_w − s_l))",
    paper="Ji et al. 2024, arXiv 2402.00856",
    reference="optional",
    label_smoothing=Range(0.0, 0.5, open_low=True, open_high=True),
    f_divergence="composes",
)
def exo_pair(p: Pairs) -> Tensor:
    """KL(q ‖ (1 − ε, ε)), the reverse KL to the smoothed label: equation 16 of Ji et al. 2024 with
    K = 2. The paper recommends ε = 1e-3; ε = 0 is infinite."""
    # q is 0 or 1 beyond, where an infinite z would make 0 · ∞ of q · log q.
    z = (p.beta * p.margin).clamp(-1000.0, 1000.0)
    chosen = logistic(z) * (F.logsigmoid(z) - math.log1p(-p.label_smoothing))
    rejected = logistic(-z) * (F.logsigmoid(-z) - math.log(p.label_smoothing))
    return chosen + rejected


@objective(
    "nca_pair",
    formula="−log σ(β · h_w) − ½ · log σ(−β · h_w) − ½ · log σ(−β · h_l)",
    paper="Chen et al. 2024, arXiv 2402.05369",
)
def nca_pair(p: Pairs) -> Tensor:
    """−log σ(β·h_w) − ½ log σ(−β·h_w) − ½ log σ(−β·h_l): noise contrastive alignment with K = 2,
    which keeps the chosen answer's likelihood from falling. Chen et al. 2024."""
    chosen, rejected = p.beta * p.chosen_ratios, p.beta * p.rejected_ratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@objective(
    "robust",
    formula="(−(1 − ε) · log σ(z) + ε · log σ(−z)) / (1 − 2ε) with z = β · (s_w − s_l)",
    paper="Chowdhury et al. 2024, arXiv 2403.00409",
    reference="optional",
    label_smoothing=SMOOTHING,
    f_divergence="composes",
)
def robust(p: Pairs) -> Tensor:
    """The unbiased estimate of the DPO loss where labels are flipped with probability ε: Chowdhury
    et al. 2024. It may be negative."""
    z, epsilon = p.beta * p.margin, p.label_smoothing
    if epsilon == 0.0:  # times log σ(−∞)
        return -F.logsigmoid(z)
    clean = (1.0 - epsilon) * F.logsigmoid(z)
    return (epsilon * F.logsigmoid(-z) - clean) / (1.0 - 2.0 * epsilon)


@objective(
    "bco_pair",
    formula="−log σ(β · h_w − δ) − log σ(−(β · h_l − δ))",
    paper="Jung et al. 2024, arXiv 2404.04656",
    options=(
        scalar(
            "delta", 0.0, "reward shift δ, detached, e.g. from RunningMean; TRL's pair form has 0"
        ),
    ),
)
def bco_pair(p: Pairs, *, delta: float | Tensor) -> Tensor:
    """−log σ(β·h_w − δ) − log σ(−(β·h_l − δ)): a binary classifier whose logit is the reward, on
    pairs. Jung et al. 2024."""
    shift = detached(delta)
    chosen, rejected = p.beta * p.chosen_ratios - shift, p.beta * p.rejected_ratios - shift
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@objective(
    "sppo_hard",
    formula="(h_w − 1/(2β))² + (h_l + 1/(2β))²",
    paper="Wu et al. 2024, arXiv 2405.00675",
)
def sppo_hard(p: Pairs) -> Tensor:
    """(h_w − 1/(2β))² + (h_l + 1/(2β))²: self-play preference optimization, equation 4.7 of Wu et
    al. 2024 with the winner's probability taken to be 1."""
    return (p.chosen_ratios - 0.5 / p.beta).square() + (p.rejected_ratios + 0.5 / p.beta).square()


@objective(
    "aot",
    formula="sigmoid's, of z = β · (sort(log π_w/π_l) − sort(log π_ref,w/π_ref,l))",
    paper="Melnyk et al. 2024, arXiv 2406.05882",
    reference="optional",
    label_smoothing=SMOOTHING,
    weightable=False,
    whole_batch=True,
)
def aot(p: Pairs) -> Tensor:
    """Alignment by optimal transport on paired data: the margins of the policy and of the reference
    are sorted over the batch, each on its own, and compared by rank. Melnyk et al. 2024."""
    policy = torch.sort(p.chosen_logps - p.rejected_logps).values
    reference = torch.sort(p.chosen_ref_logps - p.rejected_ref_logps).values
    return smoothed_logistic(p.beta * (policy - reference), p.label_smoothing)


@objective(
    "aot_unpaired",
    formula="sigmoid's, of z = β · (sort(h_w) − sort(h_l))",
    paper="Melnyk et al. 2024, arXiv 2406.05882",
    reference="optional",
    label_smoothing=SMOOTHING,
    weightable=False,
    whole_batch=True,
)
def aot_unpaired(p: Pairs) -> Tensor:
    """The same for answers to different prompts: the log-ratios of the chosen and of the rejected
    answers are sorted over the batch and compared by rank. Melnyk et al. 2024."""
    chosen, rejected = torch.sort(p.chosen_ratios).values, torch.sort(p.rejected_ratios).values
    return smoothed_logistic(p.beta * (chosen - rejected), p.label_smoothing)


@objective(
    "apo_zero",
    formula="1 − σ(β · h_w) + σ(β · h_l)",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266",
)
def apo_zero(p: Pairs) -> Tensor:
    """σ(−β·h_w) + σ(β·h_l): anchored preference optimization for data better than the model, which
    raises the chosen answer and lowers the rejected one. D'Oosterlinck et al. 2024, equation 7."""
    return logistic(-p.beta * p.chosen_ratios) + logistic(p.beta * p.rejected_ratios)


@objective(
    "apo_down",
    formula="σ(β · h_w) + 1 − σ(β · (h_w − h_l))",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266",
)
def apo_down(p: Pairs) -> Tensor:
    """σ(β·h_w) + σ(−β·(h_w − h_l)): for data worse than the model, which lowers both answers, the
    rejected one more. D'Oosterlinck et al. 2024, equation 8."""
    difference = p.beta * (p.chosen_ratios - p.rejected_ratios)
    return logistic(p.beta * p.chosen_ratios) + logistic(-difference)


@objective(
    "discopop",
    formula="−σ(−z/τ) · log σ(z) + σ(z/τ) · exp(−z) with z = β · (s_w − s_l)",
    paper="Lu et al. 2024, arXiv 2406.08414",
    options=(number("discopop_tau", 0.05, POSITIVE, "temperature τ of the blend"),),
    reference="optional",
    f_divergence="composes",
)
def discopop(p: Pairs, *, discopop_tau: float) -> Tensor:
    """σ(−z/τ) · (−log σ(z)) + σ(z/τ) · exp(−z): logistic where the margin is negative, exponential
    where it is positive. Lu et al. 2024, equation 5."""
    z = p.beta * p.margin
    # The first term is −z where σ(−z/τ) is 1; as a product its gradient would be ∞ · 0 at −∞.
    least = -1000.0 * max(1.0, discopop_tau)
    near = z.clamp(min=least)
    near = -F.logsigmoid(near) * logistic(-near / discopop_tau)
    softplus = torch.where(z < least, -z, near)
    # One exponential of the sum of logarithms: σ(z/τ) · exp(−z) itself is 0 · ∞ for very negative
    # z, where log σ(z/τ) = z/τ + log σ(−z/τ).
    tilt = 1.0 / discopop_tau - 1.0
    below = F.logsigmoid(-z / discopop_tau) + (tilt * z if tilt else 0.0)
    exponent = torch.where(z < 0.0, below, F.logsigmoid(z / discopop_tau) - z)
    return softplus + exp(exponent)


@objective(
    "sft",
    formula="NLL_w, the mean over the chosen answers' tokens",
    paper="the NLL term of Wang et al. 2024 (MPO), arXiv 2411.10442",
    reference="optional",
    f_divergence="unaffected",
    uses_beta=False,
    reads_nll=True,
)
def sft(p: Pairs) -> Tensor:
    """The negative log-likelihood of the chosen answers, the mean over all their tokens in the
    batch: one number, repeated for every pair."""
    assert p.nll is not None
    return p.nll.expand_as(p.chosen_logps)


@objective(
    "sigmoid_norm",
    formula="−log σ(β · (s_w/n_w − s_l/n_l))",
    paper="Lambert et al. 2024 (Tülu 3), arXiv 2411.15124",
    reference="optional",
    f_divergence="composes",
)
def sigmoid_norm(p: Pairs) -> Tensor:
    """−log σ(β · (s_w/n_w − s_l/n_l)): DPO on log-ratios per token. Lambert et al. 2024."""
    return -F.logsigmoid(p.beta * p.average_margin)


def _is_offset(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dim() <= 1
    return value in FINITE


@objective(
    "odpo",
    formula="−log σ(β · (h_w − h_l) − α · Δ)",
    paper="Amini et al. 2024, arXiv 2402.10571",
    options=(
        Option(
            "offset",
            REQUIRED,
            "a finite number or a floating tensor [B]",
            _is_offset,
            "Δ per pair, e.g. log(score_w − score_l) as in the paper; detached",
        ),
        number("offset_alpha", 1.0, NON_NEGATIVE, "scale α of the offset"),
    ),
    reference="optional",
)
def odpo(p: Pairs, *, offset: float | Tensor, offset_alpha: float) -> Tensor:
    """−log σ(β·(h_w − h_l) − α·Δ): DPO that asks for a margin of at least α·Δ, where Δ says by how
    much the chosen answer is better. Amini et al. 2024."""
    shift = offset.detach().to(p.chosen_ratios.dtype) if isinstance(offset, Tensor) else offset
    return -F.logsigmoid(p.beta * (p.chosen_ratios - p.rejected_ratios) - offset_alpha * shift)


@objective(
    "dpop",
    formula="−log σ(β · (h_w − h_l − λ · max(0, −h_w)))",
    paper="Pal et al. 2024 (Smaug), arXiv 2402.13228",
    options=(number("dpop_lambda", 50.0, NON_NEGATIVE, "λ, the paper's default"),),
)
def dpop(p: Pairs, *, dpop_lambda: float) -> Tensor:
    """−log σ(β·(h_w − h_l − λ·max(0, −h_w))): DPO-positive, which penalizes a chosen answer that
    becomes less likely than under the reference. Pal et al. 2024."""
    margin = p.chosen_ratios - p.rejected_ratios
    if dpop_lambda:
        margin = margin - dpop_lambda * torch.relu(-p.chosen_ratios)
    return -F.logsigmoid(p.beta * margin)


@objective(
    "cal_dpo",
    formula="−log σ(h_w − h_l) + c · ((h_w − 1/(2β))² + (h_l + 1/(2β))²)",
    paper="Xiao et al. 2024, arXiv 2412.14516",
    options=(
        number(
            "calibration_weight",
            1.0,
            NON_NEGATIVE,
            "c: 1 in the paper, ½ in its authors' released code",
        ),
    ),
)
def cal_dpo(p: Pairs, *, calibration_weight: float) -> Tensor:
    """−log σ(h_w − h_l) + c·((h_w − 1/(2β))² + (h_l + 1/(2β))²): calibrated DPO, which also fixes
    the scale of the rewards. There is no β in the first term. Xiao et al. 2024."""
    preference = -F.logsigmoid(p.chosen_ratios - p.rejected_ratios)
    return preference + calibration_weight * sppo_hard(p) if calibration_weight else preference
