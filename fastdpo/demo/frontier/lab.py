"""What all runs of a sweep share: the worlds, their references, and the truth about them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel

from . import truth
from .data import Candidates
from .models import enumerate_tree, sample
from .reference import train_reference
from .settings import Settings
from .world import World

_WARMUP, _LAST = 0.05, 0.1


@dataclass(frozen=True)
class Place:
    """A world and its reference."""

    world: World
    reference: GPT2LMHeadModel
    ref_logps: Tensor  # [P, S]

    @functools.cached_property
    def chosen_logps(self) -> Tensor:  # [P, S]
        """What "chosen" means in the data labelled by reward: the better of two answers."""
        return truth.best_of_n(self.ref_logps, self.world.rewards, 2)

    def policy(self) -> GPT2LMHeadModel:
        """A copy of the reference, to be trained."""
        return copy.deepcopy(self.reference).requires_grad_(True).train()


class Lab:
    """Makes what is asked for, once."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._places: dict[str, Place] = {}

    def place(self, kind: str = "plain") -> Place:
        """kind: plain, stops or controls (`Settings.world`)."""
        if kind not in self._places:
            world = self.settings.world(kind)
            self._places[kind] = place_of(world, train_reference(world, self.settings))
        return self._places[kind]


def place_of(world: World, reference: GPT2LMHeadModel) -> Place:
    return Place(world, reference, enumerate_tree(reference, world).logps())


def draw(
    model: GPT2LMHeadModel,
    world: World,
    draws: int,
    completions: int,
    generator: torch.Generator,
) -> Candidates:
    """`completions` answers of the model to each of `draws` prompts."""
    prompts = torch.randint(len(world.prompt_tokens), (draws,), generator=generator)
    answers = sample(model, world, prompts.repeat_interleave(completions), generator)
    return Candidates(prompts, answers.unflatten(0, (draws, completions)))


class Optimizer:
    """Adam as every method uses it: a short warmup, linear decay, gradients clipped at 1."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, steps: int):
        self.parameters = parameters
        self.adam = torch.optim.Adam(parameters, lr, fused=True)
        warmup = max(1, round(_WARMUP * steps))
        self.schedule = LambdaLR(
            self.adam,
            lambda step: min((step + 1) / warmup, 1 - (1 - _LAST) * step / steps),
        )

    def step(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.schedule.step()
