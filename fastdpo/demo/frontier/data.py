"""Preference pairs: the paper's recipe scaled down, labelled in the ways that the studies compare.

prompts drawn × 4 answers of the reference -> 6 pairs each, chosen and rejected by a label
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .models import encode
from .world import World

# Rewards are sums in another order: what is equal but for rounding is a tie.
_TIE = 1e-6


@dataclass(frozen=True)
class Candidates:
    """Answers drawn for the same prompts, D draws of K."""

    prompts: Tensor  # [D] int64, rows of world.prompt_tokens
    answers: Tensor  # [D, K, L] int64


@dataclass(frozen=True)
class Pairs:
    """Which of two answers was preferred."""

    prompts: Tensor  # [N] int64
    chosen: Tensor  # [N, L] int64
    rejected: Tensor  # [N, L] int64

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Tensor) -> Pairs:
        return Pairs(*(getattr(self, field.name)[rows] for field in fields(self)))

    def swapped(self, flip: Tensor) -> Pairs:  # [N] bool
        """With the labels turned round where `flip` says so."""
        chosen = torch.where(flip[:, None], self.rejected, self.chosen)
        rejected = torch.where(flip[:, None], self.chosen, self.rejected)
        return Pairs(self.prompts, chosen, rejected)

    def encoded(self, world: World) -> tuple[Tensor, Tensor]:
        """input_ids and labels [2N, T], the chosen answers first."""
        return encode(world, self.prompts.repeat(2), torch.cat([self.chosen, self.rejected]))


def all_pairs(candidates: Candidates) -> Pairs:
    """K · (K − 1) / 2 pairs for each draw, not yet labelled: in the order of the drawing."""
    first, second = zip(*itertools.combinations(range(candidates.answers.shape[1]), 2), strict=True)
    length = candidates.answers.shape[-1]
    return Pairs(
        candidates.prompts.repeat_interleave(len(first)),
        candidates.answers[:, list(first)].reshape(-1, length),
        candidates.answers[:, list(second)].reshape(-1, length),
    )


def best_against_worst(candidates: Candidates, world: World, rewards: Tensor) -> Pairs:
    """One pair for each draw: rejection sampling. rewards is a table [P, S]."""
    scores = rewards[candidates.prompts[:, None], world.index(candidates.answers)]  # [D, K]
    draws = torch.arange(len(scores))
    return Pairs(
        candidates.prompts,
        candidates.answers[draws, scores.argmax(-1)],
        candidates.answers[draws, scores.argmin(-1)],
    )


def reward_gap(pairs: Pairs, world: World, rewards: Tensor) -> Tensor:  # -> [N] fp64
    """Reward of chosen minus rejected, from a table [P, S]."""
    chosen = rewards[pairs.prompts, world.index(pairs.chosen)]
    return chosen - rewards[pairs.prompts, world.index(pairs.rejected)]


def by_reward(pairs: Pairs, world: World, rewards: Tensor, generator: torch.Generator) -> Pairs:
    """The higher reward is preferred; a coin decides a tie."""
    gap = reward_gap(pairs, world, rewards)
    coin = torch.rand(len(pairs), generator=generator) < 0.5
    return pairs.swapped(torch.where(gap.abs() < _TIE, coin, gap < 0))


def by_bradley_terry(
    pairs: Pairs, world: World, rewards: Tensor, generator: torch.Generator
) -> Pairs:
    """P(preferred) = σ(difference of the rewards): DPO's optimum is then π_ref · exp(r/β) / Z."""
    gap = reward_gap(pairs, world, rewards)
    kept = torch.rand(len(pairs), generator=generator, dtype=torch.float64) < gap.sigmoid()
    return pairs.swapped(~kept)


def by_camp(
    pairs: Pairs, world: World, preference: Tensor, generator: torch.Generator
) -> Pairs:  # preference [3, 3]
    """P(preferred) by the two answers' camps."""
    probs = preference[
        world.camps[world.index(pairs.chosen)], world.camps[world.index(pairs.rejected)]
    ]
    kept = torch.rand(len(pairs), generator=generator, dtype=torch.float64) < probs
    return pairs.swapped(~kept)


def flipped(pairs: Pairs, share: float, generator: torch.Generator) -> Pairs:
    """With this share of the labels turned round."""
    return pairs.swapped(torch.rand(len(pairs), generator=generator) < share)


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step [size], shuffled anew every epoch."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[:size], order[size:]
        yield rows
