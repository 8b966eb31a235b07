"""Objectives on rankings of K answers to one prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import Ranked
from .registry import REQUIRED, Option, objective


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 2


@objective(
    "plackett_luce",
    formula="−Σₖ log( exp(β · hₖ) / Σ_{j≥k} exp(β · hⱼ) ) over the ranks k = 1..K, best first",
    paper="Rafailov et al. 2023, arXiv 2305.18290, appendix A.3",
    options=(
        Option(
            "num_candidates",
            REQUIRED,
            "an integer of at least 2",
            _is_count,
            "answers per prompt, K",
        ),
    ),
    reference="optional",
    layout="ranked",
    weightable=False,
)
def plackett_luce(r: Ranked, *, num_candidates: int) -> Tensor:
    """−Σₖ log softmax over the answers from rank k on: the DPO loss of a whole ranking, equation 20
    of Rafailov et al. 2023. With K = 2 it is the sigmoid loss, to the bit."""
    loss = torch.zeros_like(r.ratios[0])
    for k in range(num_candidates - 1):
        # Rank k against the sum of those behind it, of which impossible ones (−∞) have no part:
        # logsumexp has no gradient where all are.
        if k + 2 == num_candidates:
            z = r.beta * (r.ratios[k] - r.ratios[k + 1])
        else:
            behind = r.beta * r.ratios[k + 1 :].clamp(min=-1e200)
            z = r.beta * r.ratios[k] - torch.logsumexp(behind, dim=0)
        loss = loss - F.logsigmoid(z)
    return loss
