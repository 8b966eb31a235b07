"""What is true of a distribution over all answers: exact sums, nothing sampled.

A distribution is a table of log-probabilities [P, S], prompts × answers, in fp64. With π_ref and a
reward r [P, S], the policy that maximizes E_π[r] − β · KL(π ‖ π_ref) is known (Rafailov et al.,
arXiv 2305.18290, equation 4):

    π*(y|x) = π_ref(y|x) · exp(r(x, y) / β) / Z(x)       Z(x) = Σ_y π_ref(y|x) · exp(r(x, y) / β)

so that no policy has more reward than π* at the same KL: β from ∞ to 0 draws the optimal frontier.
Prompts weigh the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean(logps: Tensor, values: Tensor) -> float:  # [P, S], [P, S] or [S]
    """E[values], the mean over prompts."""
    return by_prompt(logps, values).mean().item()


def by_prompt(logps: Tensor, values: Tensor) -> Tensor:  # [P, S], [P, S] or [S] -> [P]
    return (logps.exp() * values).sum(-1)


def kl(logps: Tensor, ref_logps: Tensor) -> float:  # [P, S], [P, S]
    """KL(π ‖ π_ref) in nats, the mean over prompts; exactly 0 for equal tables."""
    ratio = torch.where(logps > -torch.inf, logps - ref_logps, 0.0)
    return mean(logps, ratio)


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:  # -> [P]
    """log Z(x)."""
    return (ref_logps + rewards / beta).logsumexp(-1)


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:  # [P, S], [P, S] -> [P, S]
    """log π*."""
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[:, None]


def frontier(
    ref_logps: Tensor,  # [P, S]
    rewards: Tensor,  # [P, S]
    betas: Sequence[float],
) -> list[dict[str, float]]:
    """The optimal frontier, one point for each β: {"beta", "kl", "reward"}."""
    points = []
    for beta in betas:
        best = optimum(ref_logps, rewards, beta)
        points.append({"beta": beta, "kl": kl(best, ref_logps), "reward": mean(best, rewards)})
    return points


def largest_useful_kl(ref_logps: Tensor, rewards: Tensor) -> float:
    """KL of π* for β → 0: all its mass on the best answers. More KL than that buys no reward."""
    best = rewards >= rewards.amax(-1, keepdim=True) - 1e-9
    return -torch.where(best, ref_logps, -torch.inf).logsumexp(-1).mean().item()


def largest_kl(ref_logps: Tensor) -> float:
    """KL of the policy that gives all its mass to the answer that the reference finds least likely:
    no policy has more."""
    possible = torch.where(ref_logps > -torch.inf, ref_logps, torch.inf)
    return -possible.amin(-1).mean().item()


def _levels(rewards: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # each [S] ->
    """(level of each answer [S], mass of each level [K], mass below each level [K])."""
    # Rewards are sums in another order: what is equal but for rounding is a tie.
    _, level = torch.unique((rewards * 2**20).round(), return_inverse=True)
    mass = torch.zeros(int(level.max()) + 1, dtype=probs.dtype).scatter_add_(0, level, probs)
    return level, mass, mass.cumsum(0) - mass


def best_of_n(ref_logps: Tensor, rewards: Tensor, n: int) -> Tensor:  # [P, S], [P, S] -> [P, S]
    """Log-probabilities of the best of n answers of the reference, a tie drawn among the tied.

    The best has level k with probability F_k^n − F_{k−1}^n, F the levels' distribution function,
    and is the reference's among the answers of that level.
    """
    rows = []
    for logps, row in zip(ref_logps, rewards, strict=True):
        level, mass, below = _levels(row, logps.exp())
        total = mass.sum()
        # F^n − (F − m)^n = m · Σ_j F^(n−1−j) (F − m)^j, without the cancellation
        upper, lower = (below + mass) / total, below / total
        ratio = torch.zeros_like(mass)
        for j in range(n):
            ratio += upper ** (n - 1 - j) * lower**j
        rows.append(logps + ratio[level].log())
    return torch.stack(rows)


def win_rate(logps: Tensor, others: Tensor, rewards: Tensor) -> float:  # each [P, S]
    """P(reward of an answer > reward of the other's) + ½ P(equal), the mean over prompts."""
    rates = []
    for ours, theirs, row in zip(logps.exp(), others.exp(), rewards, strict=True):
        level, mass, below = _levels(row, theirs)
        rates.append((ours * (below + mass / 2)[level]).sum())
    return torch.stack(rates).mean().item()


def camp_preference(strength: float) -> Tensor:  # -> [3, 3]
    """P(an answer of camp i is preferred to one of camp j): each camp beats the next one."""
    probs = torch.full((3, 3), 0.5, dtype=torch.float64)
    for camp in range(3):
        probs[camp, (camp + 1) % 3] = strength
        probs[(camp + 1) % 3, camp] = 1 - strength
    return probs


def bradley_terry_fit(shares: Tensor, preference: Tensor) -> Tensor:  # [3], [3, 3] -> [3]
    """The camps' rewards of the Bradley-Terry model nearest to the preferences, for answers drawn
    with `shares`: where DPO's loss has its minimum, whether or not the model is true."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    weights = shares[:, None] * shares[None, :]
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        margin = logits[:, None] - logits[None, :]
        loss = -(weights * preference * torch.nn.functional.logsigmoid(margin)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = logits.detach()
    return fitted - fitted.mean()
