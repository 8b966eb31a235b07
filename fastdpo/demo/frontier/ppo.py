"""The other way: a reward model, and PPO against it (or against the true reward).

The objective is E[r] − β · KL(π ‖ π_ref), DPO's own: with the true reward both have the same
optimum π_ref · exp(r/β) / Z, and who comes nearer is a matter of budget. The KL enters as a penalty
per word in the reward; its coefficient β follows a target (Ziegler et al., arXiv 1909.08593):

    e = clip(KL / target − 1, −0.2, 0.2)      β ← β · (1 + e)      once for each batch of answers

Clipped ratios, generalized advantage estimation with γ = λ = 1, a value head beside the lm_head.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from .data import Pairs, batches
from .evaluate import Meter
from .lab import Optimizer, Place, draw
from .models import encode
from .settings import Settings
from .world import World

CLIP = 0.2
VALUE_WEIGHT = 0.5
FIRST_BETA = 0.05
KL_STEP = 0.2
# Times the learning rate of all else: its head is new. Chosen by its accuracy on other pairs.
REWARD_MODEL_LR = 3.0


class RewardModel(nn.Module):
    """A copy of the reference with a number for each of the answer's words instead of the lm_head;
    the score is their mean."""

    mean: Tensor
    scale: Tensor

    def __init__(self, reference: GPT2LMHeadModel, length: int):
        super().__init__()
        self.length = length
        self.backbone = copy.deepcopy(reference.transformer).requires_grad_(True)
        self.score = nn.Linear(reference.config.n_embd, 1)
        nn.init.zeros_(self.score.weight)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, input_ids: Tensor) -> Tensor:  # [N, T] -> [N]
        hidden = self.backbone(input_ids=input_ids).last_hidden_state[:, -self.length :]
        return (self.score(hidden)[..., 0].mean(-1) - self.mean) / self.scale


def train_reward_model(
    place: Place, pairs: Pairs, settings: Settings, generator: torch.Generator
) -> tuple[RewardModel, float]:
    """−log σ(score of chosen − score of rejected); scores have mean 0 and deviation 1 over the
    pairs' answers afterwards. Also returns the share of these pairs that it orders rightly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RewardModel(place.reference, place.world.length)
    lr = REWARD_MODEL_LR * settings.lr
    optimizer = Optimizer(list(model.parameters()), lr, settings.steps)
    for rows in batches(len(pairs), settings.batch, settings.steps, generator):
        input_ids, _ = pairs.take(rows).encoded(place.world)
        chosen, rejected = model(input_ids).chunk(2)
        optimizer.step(-F.logsigmoid(chosen - rejected).mean())
    with torch.no_grad():
        input_ids, _ = pairs.encoded(place.world)
        scores = model(input_ids)
        chosen, rejected = scores.chunk(2)
        accuracy = (chosen > rejected).float().mean().item()
        model.mean.copy_(scores.mean())
        model.scale.copy_(scores.std().clamp(min=1e-6))
    return model.eval().requires_grad_(False), accuracy


class Scorer:
    """The true reward of answers, or a reward model's."""

    def __init__(self, world: World, model: RewardModel | None):
        self.world, self.model = world, model

    @torch.no_grad()
    def __call__(self, prompts: Tensor, answers: Tensor, input_ids: Tensor) -> Tensor:  # -> [N]
        if self.model is not None:
            return self.model(input_ids)
        return self.world.rewards[prompts, self.world.index(answers)].float()


def word_logps(
    model: GPT2LMHeadModel, input_ids: Tensor, length: int
) -> tuple[Tensor, Tensor]:  # [N, T + L] -> [N, L], [N, L, D]
    """Log-probabilities of the answer's words, and the hidden states that predict them."""
    hidden = model.transformer(input_ids=input_ids).last_hidden_state[:, -length - 1 : -1]
    logps = model.lm_head(hidden).log_softmax(-1)
    return logps.gather(-1, input_ids[:, -length:, None])[..., 0], hidden


def train_ppo(
    policy: GPT2LMHeadModel,
    place: Place,
    scorer: Scorer,
    target_kl: float,
    settings: Settings,
    generator: torch.Generator,
    meter: Meter,
) -> list[dict[str, float]]:
    """PPO with as many optimizer steps as any method, on as many answers as the pairs are made of.

    Each batch of 4 · settings.batch answers is used for its share of the steps, in minibatches of
    2 · settings.batch. Returns what each batch of answers showed.
    """
    world, length = place.world, place.world.length
    if world.stops:
        raise ValueError("world should be one without stops: PPO here takes full-length answers")
    value_head = nn.Linear(policy.config.n_embd, 1)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    optimizer = Optimizer(
        [*policy.parameters(), *value_head.parameters()], settings.lr, settings.steps
    )
    rollout = 4 * settings.batch
    rounds = max(1, settings.num_samples // rollout)
    beta, told, step = FIRST_BETA, [], 0
    for turn in range(rounds):
        answers = draw(policy.eval(), world, rollout, 1, generator)
        prompts, words = answers.prompts, answers.answers[:, 0]
        meter.samples += rollout
        meter.reward_calls += 0 if scorer.model is not None else rollout
        input_ids, _ = encode(world, prompts, words)
        with torch.no_grad():
            old, hidden = word_logps(policy, input_ids, length)
            values = value_head(hidden)[..., 0]
            ratio = old - word_logps(place.reference, input_ids, length)[0]
        scores = scorer(prompts, words, input_ids)
        rewards = -beta * ratio
        rewards[:, -1] += scores
        returns = rewards.flip(-1).cumsum(-1).flip(-1)  # γ = λ = 1
        advantages = returns - values
        advantages = (advantages - advantages.mean()) / advantages.std().clamp(min=1e-6)
        end = (turn + 1) * settings.steps // rounds
        for rows in batches(rollout, 2 * settings.batch, end - step, generator):
            policy.train()
            logps, hidden = word_logps(policy, input_ids[rows], length)
            change = (logps - old[rows]).exp()
            gain = advantages[rows]
            clipped = change.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(change * gain, clipped * gain).mean()
            error = value_head(hidden)[..., 0] - returns[rows]
            optimizer.step(loss + VALUE_WEIGHT * error.square().mean())
            step += 1
            if meter.due(step):
                meter(step, policy.eval(), beta=beta)
        kl = ratio.sum(-1).mean().item()
        told.append({"step": step, "score": scores.mean().item(), "kl": kl, "beta": beta})
        beta *= 1 + min(max(kl / target_kl - 1, -KL_STEP), KL_STEP)
    return told
