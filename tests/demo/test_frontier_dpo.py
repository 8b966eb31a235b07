"""DPO in the small world comes to the optimum that is known exactly, and a broken loss does not."""

from __future__ import annotations

import math

import pytest
import torch
from sampling import sampled

from fastdpo.demo.frontier import data, ppo, preference, truth
from fastdpo.demo.frontier.evaluate import Meter
from fastdpo.demo.frontier.lab import Lab, draw
from fastdpo.demo.frontier.models import enumerate_tree
from fastdpo.demo.frontier.settings import Settings
from fastdpo.integrations import hf
from fastdpo.objectives import OBJECTIVES

# 64 answers to each of 2 prompts; enough pairs by Bradley-Terry for training never to see one
# twice, so that the optimum at BETA is π_ref · exp(r/β) / Z. The rewards are three times the
# world's: labels say more then.
SETTINGS = Settings(
    vocab_size=4,
    length=3,
    hidden=16,
    layers=1,
    sft_steps=100,
    draws=6400,
    steps=300,
    batch=128,
    lr=1e-2,
    evaluations=1,
)
SCALE, BETA = 3.0, 1.5
# KL(π ‖ π*) of the trained policy: 0.01 when right; 0.24 at the start, 0.06 and more when broken.
BOUND = 0.02


@pytest.fixture(scope="module")
def lab():
    return Lab(SETTINGS)


@pytest.fixture(scope="module")
def pairs(lab):
    place, generator = lab.place(), torch.Generator().manual_seed(0)
    candidates = draw(place.reference, place.world, SETTINGS.draws, 4, generator)
    drawn = data.all_pairs(candidates)
    return data.by_bradley_terry(drawn, place.world, SCALE * place.world.rewards, generator)


def distance_to_optimum(lab, pairs):
    """KL(π ‖ π*) after the training that every DPO run of the sweep has."""
    place = lab.place()
    world = place.world
    meter = Meter(world, place.ref_logps, world.rewards, {}, SETTINGS.steps, 1)
    loss = preference.Objective("sigmoid", BETA).loss(world, pairs, place.reference)
    policy = place.policy()
    generator = torch.Generator().manual_seed(1)
    preference.train(policy, loss, len(pairs), SETTINGS, generator, meter)
    best = truth.optimum(place.ref_logps, SCALE * world.rewards, BETA)
    return truth.kl(enumerate_tree(policy.eval(), world).logps(), best)


def test_dpo_comes_to_the_exact_optimum(lab, pairs):
    place = lab.place()
    best = truth.optimum(place.ref_logps, SCALE * place.world.rewards, BETA)
    assert truth.kl(place.ref_logps, best) > 10 * BOUND  # where it starts
    assert distance_to_optimum(lab, pairs) < BOUND


def broken(fault):
    right = hf.dpo_loss

    def dpo_loss(model, batch, ref_model=None, beta=0.1, **options):
        batch = dict(batch)
        if fault == "the sign flipped":
            for name in ("input_ids", "labels"):
                batch[name] = torch.cat(batch[name].chunk(2)[::-1])
            names = ("ref_chosen_logps", "ref_rejected_logps")
            batch.update(zip(names, [batch[name] for name in names[::-1]], strict=True))
        elif fault == "the reference left out":
            del batch["ref_chosen_logps"], batch["ref_rejected_logps"]
            options["reference_free"] = True
        else:
            beta = 2 * beta
        return right(model, batch, ref_model, beta, **options)

    return dpo_loss


FAULTS = ["the sign flipped", "the reference left out", "β doubled"]


@pytest.mark.parametrize("fault", sampled(FAULTS, ("the sign flipped",)))
def test_a_broken_loss_misses_the_bound(lab, pairs, monkeypatch, fault):
    monkeypatch.setattr(preference.hf, "dpo_loss", broken(fault))
    assert distance_to_optimum(lab, pairs) > 2 * BOUND


@pytest.mark.parametrize("beta", [0.05, 5.0])
def test_before_the_first_step_margin_kl_and_weight_are_exact(lab, pairs, beta):
    place = lab.place()
    policy = place.policy().eval()
    assert truth.kl(enumerate_tree(policy, place.world).logps(), place.ref_logps) == 0.0
    start = preference.Objective("sigmoid", beta).at_start(place, pairs, SETTINGS)
    assert start["margin"] == 0.0
    assert start["weight"] == 0.5
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_pairs_are_the_papers_recipe(lab, pairs):
    """Every two of four answers, each by its label; both labels agree with their definition."""
    place = lab.place()
    world, generator = place.world, torch.Generator().manual_seed(3)
    candidates = draw(place.reference, world, 500, 4, generator)
    drawn = data.all_pairs(candidates)
    assert len(drawn) == 3000
    first = candidates.answers[0]
    found = zip(drawn.chosen[:6].tolist(), drawn.rejected[:6].tolist(), strict=True)
    expected = [(first[i].tolist(), first[j].tolist()) for i in range(4) for j in range(i + 1, 4)]
    assert sorted(found) == sorted(expected)
    ordered = data.by_reward(drawn, world, world.rewards, generator)
    assert data.reward_gap(ordered, world, world.rewards).min() >= -1e-9
    raw = data.reward_gap(drawn, world, world.rewards)
    labelled = data.by_bradley_terry(drawn, world, world.rewards, generator)
    kept = (labelled.chosen == drawn.chosen).all(-1) & (raw.abs() > 1e-6)
    expected = raw[raw.abs() > 1e-6].sigmoid()
    assert abs(kept.sum() - expected.sum()) < 4 * (expected * (1 - expected)).sum().sqrt()
    turned = data.flipped(drawn, 0.2, generator)
    different = (drawn.chosen != drawn.rejected).any(-1)
    share = (turned.chosen != drawn.chosen).any(-1)[different].float().mean()
    assert share == pytest.approx(0.2, abs=0.03)


def test_ppo_with_the_true_reward_comes_near_the_frontier(lab):
    """At its KL it has most of the reward that can be had, and its KL is near the target."""
    place, settings = lab.place(), SETTINGS
    world = place.world
    meter = Meter(world, place.ref_logps, world.rewards, {}, settings.steps, 1)
    target = 0.4
    told = ppo.train_ppo(
        place.policy(),
        place,
        ppo.Scorer(world, None),
        target,
        settings,
        torch.Generator().manual_seed(0),
        meter,
    )
    last = meter.curve[-1]
    betas = torch.logspace(2, -2, 200).tolist()
    curve = truth.frontier(place.ref_logps, world.rewards, betas)
    best = max(point["reward"] for point in curve if point["kl"] <= last["kl"])
    start = truth.mean(place.ref_logps, world.rewards)
    assert last["reward"] - start > 0.6 * (best - start)
    assert target / 2.5 < last["kl"] < 2.5 * target
    assert meter.samples == len(told) * 4 * settings.batch <= settings.num_samples


def test_the_reward_model_learns_the_order(lab):
    place, generator = lab.place(), torch.Generator().manual_seed(0)
    drawn = data.all_pairs(draw(place.reference, place.world, 512, 4, generator))
    pairs = data.by_reward(drawn, place.world, place.world.rewards, generator)
    model, accuracy = ppo.train_reward_model(place, pairs, SETTINGS, generator)
    assert accuracy > 0.75
    rows = torch.arange(2).repeat_interleave(place.world.num_sequences)
    answers = place.world.sequences.repeat(2, 1)
    scores = ppo.Scorer(place.world, model)(
        rows, answers, preference.encode(place.world, rows, answers)[0]
    )
    true = place.world.rewards.flatten()
    assert torch.corrcoef(torch.stack([scores.double(), true]))[0, 1] > 0.6


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "kto", "simpo", "apo_zero", "robust"])
def test_other_objectives_raise_the_reward(lab, pairs, name):
    assert name in OBJECTIVES
    place, settings = lab.place(), SETTINGS
    meter = Meter(place.world, place.ref_logps, place.world.rewards, {}, 60, 1)
    objective = preference.Objective(name, 0.3)
    loss = objective.loss(place.world, pairs, place.reference)
    generator = torch.Generator().manual_seed(1)
    preference.train(place.policy(), loss, len(pairs), settings, generator, meter, steps=range(60))
    start = truth.mean(place.ref_logps, place.world.rewards)
    assert meter.curve[-1]["reward"] > start + 0.1
