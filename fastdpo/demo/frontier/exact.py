"""What the figures draw behind the methods: the truth about each world, nothing trained but its
reference."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import methods, truth
from .evaluate import win_rates
from .lab import Lab
from .models import enumerate_tree, sample
from .plan import BETAS, REFERENCES, WEIGHTS, Run
from .world import text

# β from where the optimum is the reference to where it is the best answers.
CURVE = tuple(math.exp(3.4 - 0.16 * step) for step in range(41))
BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def exact(lab: Lab, run: Run) -> dict[str, Any]:
    """The record of a `truth` run."""
    return {
        "plain": plain,
        "references": references,
        "cycle": cycle,
        "stops": stops,
        "controls": controls,
        "two_rewards": two_rewards,
    }[run["of"]](lab)


def plain(lab: Lab) -> dict[str, Any]:
    place = lab.place()
    ref, rewards = place.ref_logps, place.world.rewards
    best_of = []
    for n in BEST_OF:
        best = truth.best_of_n(ref, rewards, n)
        best_of.append({"n": n, "kl": truth.kl(best, ref), "reward": truth.mean(best, rewards)})
    prompts = torch.zeros(6, dtype=torch.int64)
    answers = sample(place.reference, place.world, prompts, torch.Generator().manual_seed(0))
    return {
        "sequences": place.world.num_sequences,
        "frontier": truth.frontier(ref, rewards, CURVE),
        "optimum": truth.frontier(ref, rewards, BETAS),
        "best_of_n": best_of,
        "largest_useful_kl": truth.largest_useful_kl(ref, rewards),
        "largest_kl": truth.largest_kl(ref),
        "best_reward": rewards.amax(-1).mean().item(),
        "win_rates": win_rates(
            enumerate_tree(place.reference, place.world), ref, rewards, place.chosen_logps
        ),
        "answers": {
            "prompt": text(place.world.prompt_tokens[0].tolist()),
            "reference": [text(answer) for answer in answers.tolist()],
        },
    }


def references(lab: Lab) -> dict[str, Any]:
    curves = {}
    for name in REFERENCES:
        place = methods.other_reference(lab, name)
        ref, rewards = place.ref_logps, place.world.rewards
        curves[name] = {
            "frontier": truth.frontier(ref, rewards, CURVE),
            "optimum": truth.frontier(ref, rewards, (methods.BRADLEY_TERRY_BETA,)),
        }
    return {"curves": curves, "beta": methods.BRADLEY_TERRY_BETA}


def cycle(lab: Lab) -> dict[str, Any]:
    """The camps' shares: the reference's, and where the two losses have their minimum."""
    place = lab.place()
    preference = truth.camp_preference(methods.CYCLE_STRENGTH)
    masks = [(place.world.camps == camp).double() for camp in range(3)]
    shares = torch.stack([truth.by_prompt(place.ref_logps, mask) for mask in masks], 1)  # [P, 3]
    beta = methods.CYCLE_BETA
    sigmoid, ipo = [], []
    for row in shares:
        sigmoid.append((row.log() + truth.bradley_terry_fit(row, preference) / beta).softmax(-1))
        # A sum of squares: h is the mean advantage over the reference's answers.
        ipo.append((row.log() + (2 * preference - 1) @ row / (2 * beta)).softmax(-1))
    return {
        "strength": methods.CYCLE_STRENGTH,
        "beta": beta,
        "reference": shares.mean(0).tolist(),
        "sigmoid": torch.stack(sigmoid).mean(0).tolist(),
        "ipo": torch.stack(ipo).mean(0).tolist(),
    }


def stops(lab: Lab) -> dict[str, Any]:
    place = lab.place("stops")
    lengths = place.world.lengths
    best = truth.optimum(place.ref_logps, place.world.rewards, methods.BRADLEY_TERRY_BETA)
    return {
        "reference_length": truth.mean(place.ref_logps, lengths),
        "optimum_length": truth.mean(best, lengths),
        "beta": methods.BRADLEY_TERRY_BETA,
        "bias": methods.LENGTH_BIAS,
    }


def controls(lab: Lab) -> dict[str, Any]:
    place = lab.place("controls")
    best = place.world.rewards.amax(-1).unflatten(0, (2, -1)).mean(-1)
    return {
        "beta": methods.STUDY_BETA,
        "reference": methods.sentiment_by_control(place, place.ref_logps),
        "best": [best[0].item(), -best[1].item()],
    }


def two_rewards(lab: Lab) -> dict[str, Any]:
    """The exact optimum of each blend at one β, and the two rewards without a reference's pull."""
    place = lab.place()
    world, points = place.world, []
    marked = {0.0, *WEIGHTS, 1.0}
    for weight in sorted({*(step / 20 for step in range(21)), *marked}):
        blend = weight * world.rewards + (1 - weight) * world.variety
        best = truth.optimum(place.ref_logps, blend, methods.TWO_REWARDS_BETA)
        points.append(
            {
                "weight": weight,
                "reward": truth.mean(best, world.rewards),
                "variety": truth.mean(best, world.variety),
                "kl": truth.kl(best, place.ref_logps),
            }
        )
    return {
        "beta": methods.TWO_REWARDS_BETA,
        "frontier": points,
        "reference": {
            "reward": truth.mean(place.ref_logps, world.rewards),
            "variety": truth.mean(place.ref_logps, world.variety),
        },
    }
