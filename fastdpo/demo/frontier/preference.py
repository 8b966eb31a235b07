"""Training on pairs: DPO and its relatives by this package's loss, and the paper's two baselines
that need nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations import hf
from ...objectives import OBJECTIVES, kl_estimate
from .data import Pairs, batches
from .evaluate import Meter
from .lab import Optimizer, Place
from .models import encode
from .settings import Settings
from .world import World

# A step's loss, from the policy and the rows of the pairs, and what it has to tell.
Loss = Callable[[nn.Module, Tensor], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Objective:
    """An entry of `fastdpo.objectives.OBJECTIVES` with its options.

    per_pair are options that differ from pair to pair, each [N].
    """

    name: str
    beta: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    per_pair: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def reference_free(self) -> bool:
        return OBJECTIVES[self.name].reference == "refused"

    def loss(self, world: World, pairs: Pairs, reference: nn.Module) -> Loss:
        """The loss of this package, `fastdpo.integrations.hf.dpo_loss`.

        The reference's log-probabilities are computed once, before training, but where its weights
        differ from pair to pair (LD-DPO).
        """
        ref_logps = None
        if not self.reference_free and "ld_alpha" not in self.options:
            ref_logps = reference_logps(world, pairs, reference)

        def step(policy: nn.Module, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
            known = None if ref_logps is None else ref_logps[:, rows]
            out = self.output(policy, world, pairs, rows, reference, known)
            margin = out.chosen_rewards - out.rejected_rewards
            return out.loss, {
                "loss": out.loss.item(),
                "margin": margin.mean().item(),
                "weight": torch.sigmoid(-margin).mean().item(),
            }

        return step

    def output(
        self,
        policy: nn.Module,
        world: World,
        pairs: Pairs,
        rows: Tensor,  # [B]
        reference: nn.Module,
        ref_logps: Tensor | None = None,  # [2, B] chosen, rejected; None: from the model
    ) -> hf.DPOOutput:
        part = pairs.take(rows)
        input_ids, labels = part.encoded(world)
        batch = {"input_ids": input_ids, "labels": labels}
        single = OBJECTIVES[self.name].layout == "unpaired"
        if ref_logps is not None and single:
            batch["ref_logps"] = ref_logps.flatten()
        elif ref_logps is not None:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref_logps
        more: dict[str, Any] = {name: values[rows] for name, values in self.per_pair.items()}
        if self.name == "kto":
            more["desirable"] = torch.arange(2 * len(part)) < len(part)
            more["kl"] = _mismatched_kl(policy, reference, world, part)
        return hf.dpo_loss(
            policy,
            batch,
            ref_model=None if self.reference_free or ref_logps is not None else reference,
            reference_free=self.reference_free,
            beta=self.beta,
            objective=self.name,
            **self.options,
            **more,
        )

    @torch.no_grad()
    def at_start(self, place: Place, pairs: Pairs, settings: Settings) -> dict[str, float]:
        """What a first batch tells before any step, policy and reference run side by side: margin
        and weight are exactly 0 and ½ where there is a reference."""
        rows = torch.arange(settings.batch)
        out = self.output(place.policy(), place.world, pairs, rows, place.reference)
        margin = out.chosen_rewards - out.rejected_rewards
        return {
            "step": 0,
            "loss": out.loss.item(),
            "margin": margin.mean().item(),
            "weight": torch.sigmoid(-margin).mean().item(),
        }


@torch.no_grad()
def reference_logps(world: World, pairs: Pairs, reference: nn.Module) -> Tensor:  # -> [2, N]
    """Of the chosen answers, and of the rejected ones."""
    input_ids, labels = pairs.encoded(world)
    logps = hf.sequence_logps(reference, input_ids, labels)
    assert isinstance(logps, Tensor)
    return logps.unflatten(0, (2, -1))


@torch.no_grad()
def _mismatched_kl(policy: nn.Module, reference: nn.Module, world: World, pairs: Pairs) -> Tensor:
    """KTO's reference point: log-ratios of answers to other pairs' prompts."""
    input_ids, labels = encode(
        world, pairs.prompts.roll(1).repeat(2), torch.cat([pairs.chosen, pairs.rejected])
    )
    ours = hf.sequence_logps(policy, input_ids, labels)
    theirs = hf.sequence_logps(reference, input_ids, labels)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    return kl_estimate(ours, theirs)


def unlikelihood(world: World, pairs: Pairs, alpha: float) -> Loss:
    """−log π(chosen) + α · log π(rejected), as the paper's baseline: nothing holds it back."""

    def step(policy: nn.Module, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        input_ids, labels = pairs.take(rows).encoded(world)
        logps = hf.sequence_logps(policy, input_ids, labels)
        assert isinstance(logps, Tensor)
        chosen, rejected = logps.chunk(2)
        loss = (alpha * rejected - chosen).mean()
        return loss, {"loss": loss.item()}

    return step


def preferred_fine_tuning(world: World, pairs: Pairs) -> Loss:
    """Next-word prediction on the chosen answers."""

    def step(policy: nn.Module, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        part = pairs.take(rows)
        input_ids, labels = encode(world, part.prompts, part.chosen)
        logps = hf.sequence_logps(policy, input_ids, labels)
        assert isinstance(logps, Tensor)
        loss = -logps.sum() / (labels >= 0).sum()
        return loss, {"loss": loss.item()}

    return step


def train(
    policy: nn.Module,
    loss: Loss,
    count: int,
    settings: Settings,
    generator: torch.Generator,
    meter: Meter,
    optimizer: Optimizer | None = None,
    steps: range | None = None,
) -> list[dict[str, float]]:
    """Steps on batches of `count` pairs; what the loss tells, step by step.

    `optimizer` and `steps`, some of all, are for training that goes on with other pairs.
    """
    steps = range(settings.steps) if steps is None else steps
    if optimizer is None:
        optimizer = Optimizer(list(policy.parameters()), settings.lr, settings.steps)
    told = []
    drawn = batches(count, settings.batch, len(steps), generator)
    for step, rows in enumerate(drawn, steps.start + 1):
        policy.train()
        value, more = loss(policy, rows)
        optimizer.step(value)
        told.append({"step": step, **more})
        if meter.due(step):
            meter(step, policy.eval())
    return told
