"""f-divergences between policy and reference in place of the reverse KL.

With a divergence D_f in the constrained problem, the optimal policy satisfies r = β · f'(π/π_ref) +
a term of the prompt alone, so the log-ratio h = log π/π_ref in a loss of reward differences becomes
the score f'(e^h) (Wang et al. 2023, arXiv 2309.16240). Every f here has f'(1) = 0, so that a policy
equal to the reference scores 0 whatever is done to the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import expm1


@dataclass(frozen=True)
class FDivergence:
    """Score f'(e^h) of log-ratios h."""

    name: str
    alpha: float = 0.5  # of the α-divergence

    def __call__(self, ratios: Tensor) -> Tensor:  # any shape, elementwise
        return _SCORES[self.name](ratios, self.alpha)

    @property
    def is_reverse_kl(self) -> bool:
        limit = self.name == "alpha_divergence" and self.alpha == 1.0
        return self.name == "reverse_kl" or limit


def _reverse_kl(ratios: Tensor, alpha: float) -> Tensor:
    """f'(t) = log t."""
    return ratios


def _forward_kl(ratios: Tensor, alpha: float) -> Tensor:
    """f'(t) = 1 − 1/t."""
    return -expm1(-ratios)


def _js_divergence(ratios: Tensor, alpha: float) -> Tensor:
    """f'(t) = log(2t / (1 + t))."""
    # The sum cancels near h = 0, the logarithm of one term overflows far from it.
    near = -torch.log1p(0.5 * torch.expm1(-ratios.clamp(-1.0, 1.0)))
    return torch.where(ratios.abs() <= 1.0, near, math.log(2.0) + F.logsigmoid(ratios))


def _alpha_divergence(ratios: Tensor, alpha: float) -> Tensor:
    """f'(t) = (t^(α − 1) − 1) / (α − 1), log t in the limit α → 1."""
    power = alpha - 1.0
    if power == 0.0:
        return ratios
    return expm1(power * ratios) / power


_SCORES: Final[dict[str, Callable[[Tensor, float], Tensor]]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
F_DIVERGENCES: Final = tuple(_SCORES)
