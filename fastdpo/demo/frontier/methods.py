"""How each method of `plan.METHODS` is run: from the lab and a `Run` to its record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import data, ppo, preference, truth
from .data import Pairs
from .evaluate import Meter, win_rates
from .lab import Lab, Optimizer, Place, draw, place_of
from .plan import Run
from .preference import Loss, Objective
from .reference import train_reference

Record = dict[str, Any]

# The studies beside the frontier hold these still.
STUDY_BETA = 0.1  # flipped labels, lengths, strategies, control: where DPO moves far
BRADLEY_TERRY_BETA = 0.3  # references
TWO_REWARDS_BETA = 0.5
CYCLE_BETA, CYCLE_STRENGTH = 0.25, 0.9
CDPO_SMOOTHING = 0.1
LENGTH_BIAS = 0.5  # what a labeller gives for each word, beside the reward
LENGTH_OBJECTIVES = {
    "sigmoid": Objective("sigmoid", STUDY_BETA),
    "sigmoid_norm": Objective("sigmoid_norm", 5 * STUDY_BETA),
    "simpo": Objective("simpo", 2.5, {"gamma": 0.5}),
    "ld_dpo": Objective("sigmoid", STUDY_BETA, {"ld_alpha": 0.3}),
}
FLAT, SHARP, UNLIKE_MOOD = 0.4, 2.0, 12.0
ROUNDS = 4  # of iterated DPO


def dpo(lab: Lab, run: Run) -> Record:
    place = lab.place()
    pairs = labelled(lab, place, run.seed, run["labels"])
    objective = Objective("sigmoid", run["beta"])
    finished = train_objective(lab, run, place, pairs, objective, every=True)
    record = finished.record
    logps = finished.logps
    best = truth.optimum(place.ref_logps, place.world.rewards, run["beta"])
    record["kl_to_optimum"] = truth.kl(logps, best)
    record["win_rates"] = _win_rates(finished, place)
    return record


def ppo_learned(lab: Lab, run: Run) -> Record:
    return _ppo(lab, run, learned=True)


def ppo_true(lab: Lab, run: Run) -> Record:
    return _ppo(lab, run, learned=False)


def _ppo(lab: Lab, run: Run, learned: bool) -> Record:
    place, settings = lab.place(), lab.settings
    clock = Clock()
    model, record = None, {}
    if learned:
        pairs = labelled(lab, place, run.seed, "reward")
        model, accuracy = ppo.train_reward_model(place, pairs, settings, _generator(run, 2))
        record = {"reward_model_accuracy": accuracy, "reward_model_budget": clock.spent()}
    meter = _meter(lab, place, every=True)
    # The reward model has seen the pairs; the true reward needs none.
    meter.samples = meter.reward_calls = settings.num_samples if learned else 0
    policy = place.policy()
    told = ppo.train_ppo(
        policy,
        place,
        ppo.Scorer(place.world, model),
        run["target_kl"],
        settings,
        _generator(run, 1),
        meter,
    )
    finished = _finished(lab, meter, clock, extra_steps=settings.steps if learned else 0)
    return {
        **finished.record,
        **record,
        "rounds": told,
        "win_rates": _win_rates(finished, place),
    }


def rloo(lab: Lab, run: Run) -> Record:
    """TRL's trainer."""
    from .rloo import train_rloo

    place, clock = lab.place(), Clock()
    meter = _meter(lab, place, every=True)
    meter.samples = meter.reward_calls = 0
    train_rloo(place, run["beta"], lab.settings, run.seed, meter)
    finished = _finished(lab, meter, clock)
    return {**finished.record, "win_rates": _win_rates(finished, place)}


def unlikelihood(lab: Lab, run: Run) -> Record:
    place = lab.place()
    pairs = labelled(lab, place, run.seed, "reward")
    loss = preference.unlikelihood(place.world, pairs, run["alpha"])
    finished = _train(lab, run, place, pairs, loss, every=True)
    return {**finished.record, "win_rates": _win_rates(finished, place)}


def preferred_ft(lab: Lab, run: Run) -> Record:
    place = lab.place()
    pairs = labelled(lab, place, run.seed, "reward")
    finished = _train(
        lab, run, place, pairs, preference.preferred_fine_tuning(place.world, pairs), every=True
    )
    return {**finished.record, "win_rates": _win_rates(finished, place)}


def objective_of(name: str, beta: float, share: float = CDPO_SMOOTHING) -> Objective:
    """By its name in the figures; `share` is what cdpo and robust take for the share of flips."""
    if name == "cdpo":
        return Objective("sigmoid", beta, {"label_smoothing": share})
    if name == "robust":
        return Objective("robust", beta, {"label_smoothing": share})
    if name == "simpo":
        return Objective("simpo", beta, {"gamma_beta_ratio": 0.3})
    return Objective(name, beta)


def other_objective(lab: Lab, run: Run) -> Record:
    """ipo, cdpo, kto, simpo, apo_zero: the same pairs, another objective of the registry."""
    place = lab.place()
    pairs = labelled(lab, place, run.seed, "reward")
    objective = objective_of(run.method, run["beta"])
    return train_objective(lab, run, place, pairs, objective).record


def flipped(lab: Lab, run: Run) -> Record:
    place = lab.place()
    pairs = labelled(lab, place, run.seed, "reward")
    pairs = data.flipped(pairs, run["share"], _generator(run, 3))
    objective = objective_of(run["objective"], STUDY_BETA, run["share"])
    return train_objective(lab, run, place, pairs, objective).record


def cycle(lab: Lab, run: Run) -> Record:
    place = lab.place()
    generator = _generator(run, 0)
    pairs = _drawn(lab, place, generator)
    preferred = truth.camp_preference(CYCLE_STRENGTH)
    pairs = data.by_camp(pairs, place.world, preferred, generator)
    shares = {f"camp{camp}": (place.world.camps == camp).double() for camp in range(3)}
    objective = Objective(run["objective"], CYCLE_BETA)
    return train_objective(lab, run, place, pairs, objective, shares).record


def reference(lab: Lab, run: Run) -> Record:
    """Pairs of the good reference's answers; another reference in the loss, and to start from."""
    good = lab.place()
    pairs = labelled(lab, good, run.seed, "bradley_terry")
    place = other_reference(lab, run["reference"])
    objective = Objective("sigmoid", BRADLEY_TERRY_BETA)
    finished = train_objective(lab, run, place, pairs, objective)
    best = truth.optimum(place.ref_logps, place.world.rewards, BRADLEY_TERRY_BETA)
    return {**finished.record, "kl_to_optimum": truth.kl(finished.logps, best)}


def other_reference(lab: Lab, name: str) -> Place:
    """flat and sharp: the good one's logits, multiplied; unlike: it has read slatings alone."""
    good = lab.place()
    if name == "good":
        return good
    if name == "unlike":
        model = train_reference(good.world, lab.settings, UNLIKE_MOOD, praise=0.0)
    else:
        model = good.policy().eval().requires_grad_(False)
        model.lm_head.weight.mul_(FLAT if name == "flat" else SHARP)
    return place_of(good.world, model)


def length(lab: Lab, run: Run) -> Record:
    """A labeller who likes long answers, in a world where answers stop."""
    place = lab.place("stops")
    world, generator = place.world, _generator(run, 0)
    pairs = _drawn(lab, place, generator)
    biased = world.rewards + LENGTH_BIAS * world.lengths
    pairs = data.by_reward(pairs, world, biased, generator)
    objective = LENGTH_OBJECTIVES[run["objective"]]
    values = {"length": world.lengths}
    return train_objective(lab, run, place, pairs, objective, values, every=True).record


def strategy(lab: Lab, run: Run) -> Record:
    """The same number of answers, drawn and paired in three ways; the label is the reward's."""
    place, settings = lab.place(), lab.settings
    world, clock = place.world, Clock()
    objective = Objective("sigmoid", STUDY_BETA)
    generator = _generator(run, 0)
    if run["strategy"] != "iterated":
        candidates = draw(place.reference, world, settings.draws, settings.completions, generator)
        if run["strategy"] == "offline":
            pairs = data.by_reward(data.all_pairs(candidates), world, world.rewards, generator)
        else:
            pairs = data.best_against_worst(candidates, world, world.rewards)
        return train_objective(lab, run, place, pairs, objective, every=True).record
    policy, meter, done = place.policy(), _meter(lab, place, every=True), 0
    training = _generator(run, 1)
    meter.samples = meter.reward_calls = 0
    optimizer = Optimizer(list(policy.parameters()), settings.lr, settings.steps)
    for turn in range(ROUNDS):
        draws = (turn + 1) * settings.draws // ROUNDS - turn * settings.draws // ROUNDS
        candidates = draw(policy.eval(), world, draws, settings.completions, generator)
        meter.samples += draws * settings.completions
        meter.reward_calls += draws * settings.completions
        pairs = data.by_reward(data.all_pairs(candidates), world, world.rewards, generator)
        end = (turn + 1) * settings.steps // ROUNDS
        preference.train(
            policy,
            objective.loss(world, pairs, place.reference),
            len(pairs),
            settings,
            training,
            meter,
            optimizer,
            range(done, end),
        )
        done = end
    return _finished(lab, meter, clock).record


def control(lab: Lab, run: Run) -> Record:
    """A control token before the prompt turns round which answer is preferred."""
    place = lab.place("controls")
    pairs = labelled(lab, place, run.seed, "reward")
    objective = Objective("sigmoid", STUDY_BETA)
    finished = train_objective(lab, run, place, pairs, objective)
    return {**finished.record, "sentiment": sentiment_by_control(place, finished.logps)}


def sentiment_by_control(place: Place, logps: Tensor) -> list[float]:
    """The mean sentiment after either control token, its sign not turned round."""
    rewards = truth.by_prompt(logps, place.world.rewards).unflatten(0, (2, -1)).mean(-1)
    return [rewards[0].item(), -rewards[1].item()]


def weighted(lab: Lab, run: Run) -> Record:
    """Labels by a blend of two rewards: weight · sentiment + (1 − weight) · variety."""
    place, weight = lab.place(), run["weight"]
    world, generator = place.world, _generator(run, 0)
    blend = weight * world.rewards + (1 - weight) * world.variety
    pairs = data.by_bradley_terry(_drawn(lab, place, generator), world, blend, generator)
    objective = Objective("sigmoid", TWO_REWARDS_BETA)
    values = {"variety": world.variety}
    return train_objective(lab, run, place, pairs, objective, values).record


def modpo(lab: Lab, run: Run) -> Record:
    """MODPO (arXiv 2310.03708): labels by the sentiment alone, the other reward as a margin,

        −log σ( β/w · (h_w − h_l) − (1 − w)/w · (variety_w − variety_l) )

    the registry's `odpo` with that offset. The optimum is the blend's.
    """
    place, weight = lab.place(), run["weight"]
    world = place.world
    pairs = labelled(lab, place, run.seed, "bradley_terry")
    offset = (1 - weight) / weight * data.reward_gap(pairs, world, world.variety)
    objective = Objective("odpo", TWO_REWARDS_BETA / weight, per_pair={"offset": offset.float()})
    values = {"variety": world.variety}
    return train_objective(lab, run, place, pairs, objective, values).record


# -- what they share ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    record: Record
    meter: Meter

    @property
    def logps(self) -> Tensor:  # [P, S]
        assert self.meter.tree is not None
        return self.meter.tree.logps()


class Clock:
    """Seconds, by the wall and of this process's CPU."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
        }


def labelled(lab: Lab, place: Place, seed: int, labels: str) -> Pairs:
    """The paper's pairs from the reference's answers: the same for every method of a seed."""
    generator = torch.Generator().manual_seed(1000 * seed)
    pairs = _drawn(lab, place, generator)
    label = data.by_reward if labels == "reward" else data.by_bradley_terry
    return label(pairs, place.world, place.world.rewards, generator)


def train_objective(
    lab: Lab,
    run: Run,
    place: Place,
    pairs: Pairs,
    objective: Objective,
    values: Mapping[str, Tensor] | None = None,
    every: bool = False,
) -> Finished:
    """`every`: with all evaluations along training, else one half-way and one at the end."""
    loss = objective.loss(place.world, pairs, place.reference)
    start = objective.at_start(place, pairs, lab.settings)
    return _train(lab, run, place, pairs, loss, values, every, start)


def _train(
    lab: Lab,
    run: Run,
    place: Place,
    pairs: Pairs,
    loss: Loss,
    values: Mapping[str, Tensor] | None = None,
    every: bool = False,
    start: dict[str, float] | None = None,
) -> Finished:
    clock = Clock()
    meter = _meter(lab, place, values, every)
    told = preference.train(
        place.policy(), loss, len(pairs), lab.settings, _generator(run, 1), meter
    )
    finished = _finished(lab, meter, clock)
    if start is not None:
        finished.record["training"] = _thinned([start, *told])
    return finished


def _meter(
    lab: Lab, place: Place, values: Mapping[str, Tensor] | None = None, every: bool = False
) -> Meter:
    """It knows the reference's own values already, and that the pairs' answers were drawn."""
    settings = lab.settings
    meter = Meter(
        place.world,
        place.ref_logps,
        place.world.rewards,
        {} if values is None else values,
        settings.steps,
        settings.evaluations if every else min(2, settings.evaluations),
    )
    meter.start(place.ref_logps)
    meter.samples = meter.reward_calls = settings.num_samples
    return meter


def _finished(lab: Lab, meter: Meter, clock: Clock, extra_steps: int = 0) -> Finished:
    settings, last = lab.settings, meter.curve[-1]
    steps = settings.steps + extra_steps
    budget = {
        "optimizer_steps": steps,
        "samples": last["samples"],
        "reward_calls": last["reward_calls"],
        "sampled_tokens": last["samples"] * settings.length,
        "trained_tokens": steps * 2 * settings.batch * settings.length,
        "training_seconds": last["seconds"],
        "training_cpu_seconds": last["cpu_seconds"],
        **clock.spent(),
    }
    return Finished({"budget": budget, "curve": meter.curve}, meter)


def _thinned(told: list[dict[str, float]]) -> list[dict[str, float]]:
    """The start, then means over about forty equal stretches of training."""
    first, rest = told[0], told[1:]
    size = max(1, len(rest) // 40)
    rows = [first]
    for begin in range(0, len(rest), size):
        part = rest[begin : begin + size]
        row = {key: sum(entry[key] for entry in part) / len(part) for key in part[0]}
        rows.append({**row, "step": part[-1]["step"]})
    return rows


def _win_rates(finished: Finished, place: Place) -> list[dict[str, float]]:
    assert finished.meter.tree is not None
    return win_rates(finished.meter.tree, place.ref_logps, place.world.rewards, place.chosen_logps)


def _drawn(lab: Lab, place: Place, generator: torch.Generator) -> Pairs:
    settings = lab.settings
    return data.all_pairs(
        draw(place.reference, place.world, settings.draws, settings.completions, generator)
    )


def _generator(run: Run, stream: int) -> torch.Generator:
    """0: the data, 1: training, 2: the reward model, 3: flips."""
    return torch.Generator().manual_seed(1000 * run.seed + stream)
