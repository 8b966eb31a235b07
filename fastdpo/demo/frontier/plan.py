"""What a sweep consists of: one `Run` for each line of a figure and each seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

BETAS = (0.05, 0.1, 1.0, 5.0)  # the paper's
TARGET_KLS = (3.0, 6.0, 9.0, 12.0)  # the paper's
ALPHAS = (0.05, 0.1, 0.5, 1.0)  # the paper's, of unlikelihood
# As `ipo` has β: its margin aims at 1/(2β). SimPO's β multiplies log-probabilities per word.
OBJECTIVE_BETAS = {
    "ipo": (0.05, 0.1, 1.0),
    "cdpo": (0.05, 0.1, 1.0),
    "kto": (0.05, 0.1, 1.0),
    "apo_zero": (0.05, 0.1, 1.0),
    "simpo": (1.0, 2.5, 10.0),
}
LABELS = ("reward", "bradley_terry")
RLOO_BETAS = (0.1, 1.0)
FLIPPED = ("sigmoid", "cdpo", "robust", "ipo")
FLIP_SHARES = (0.1, 0.2)
CYCLES = ("sigmoid", "ipo")
REFERENCES = ("good", "flat", "sharp", "unlike")
LENGTHS = ("sigmoid", "sigmoid_norm", "simpo", "ld_dpo")
STRATEGIES = ("offline", "best_against_worst", "iterated")
WEIGHTS = (0.25, 0.5, 0.75)

# method -> what it is given: the name of each knob and the values that it knows (None: any positive
# number)
METHODS: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "truth": {"of": ("plain", "references", "cycle", "stops", "controls", "two_rewards")},
    "dpo": {"labels": LABELS, "beta": None},
    "ppo_learned": {"target_kl": None},
    "ppo_true": {"target_kl": None},
    "rloo": {"beta": None},
    "unlikelihood": {"alpha": None},
    "preferred_ft": {},
    **{name: {"beta": None} for name in OBJECTIVE_BETAS},
    "flipped": {"objective": FLIPPED, "share": None},
    "cycle": {"objective": CYCLES},
    "reference": {"reference": REFERENCES},
    "length": {"objective": LENGTHS},
    "strategy": {"strategy": STRATEGIES},
    "control": {},
    "weighted": {"weight": None},
    "modpo": {"weight": None},
}


@dataclass(frozen=True)
class Run:
    """A method with its knobs and a seed (of the data, the batches and what is sampled).

    Raises:
        ValueError: an unknown method, or knobs that are not the method's.
    """

    method: str
    knobs: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method should be one of {', '.join(METHODS)}, got {self.method!r}")
        known = METHODS[self.method]
        given = [name for name, _ in self.knobs]
        if given != list(known):
            raise ValueError(
                f"knobs of {self.method} should be ({', '.join(known)}), got ({', '.join(given)})"
            )
        for name, value in self.knobs:
            values = known[name]
            if values is None:
                if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                    raise ValueError(f"{name} should be a number of at least 0, got {value!r}")
            elif value not in values:
                options = ", ".join(map(str, values))
                raise ValueError(f"{name} should be one of {options}, got {value!r}")
        if self.seed < 0:
            raise ValueError(f"seed should be at least 0, got {self.seed}")

    def __getitem__(self, knob: str) -> Any:
        return dict(self.knobs)[knob]

    @property
    def name(self) -> str:
        """Also its file's."""
        values = [value for _, value in self.knobs]
        knobs = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        seed = [] if self.method == "truth" else [f"seed{self.seed}"]
        return "-".join([self.method, *knobs, *seed])


def runs_of(method: str, seed: int, **knobs: Iterable[Any]) -> list[Run]:
    """All combinations of the knobs' values."""
    return [
        Run(method, tuple(zip(knobs, values, strict=True)), seed)
        for values in itertools.product(*knobs.values())
    ]


def truths(*names: str) -> list[Run]:
    return runs_of("truth", 0, of=names)


def full_plan(seeds: int = 3) -> list[Run]:
    """Everything, seed by seed: the figures of a sweep that was cut short have all their lines.

    Raises:
        ValueError: seeds is not positive.
    """
    if seeds < 1:
        raise ValueError(f"seeds should be at least 1, got {seeds}")
    plan = runs_of("truth", 0, of=METHODS["truth"]["of"] or ())
    for seed in range(seeds):
        plan += runs_of("dpo", seed, labels=LABELS, beta=BETAS)
        plan += runs_of("ppo_learned", seed, target_kl=TARGET_KLS)
        plan += runs_of("ppo_true", seed, target_kl=TARGET_KLS)
        plan += runs_of("unlikelihood", seed, alpha=ALPHAS)
        plan += runs_of("preferred_ft", seed)
        for name, betas in OBJECTIVE_BETAS.items():
            plan += runs_of(name, seed, beta=betas)
        plan += runs_of("flipped", seed, objective=FLIPPED, share=FLIP_SHARES)
        plan += runs_of("cycle", seed, objective=CYCLES)
        plan += runs_of("reference", seed, reference=REFERENCES)
        plan += runs_of("length", seed, objective=LENGTHS)
        plan += runs_of("strategy", seed, strategy=STRATEGIES)
        plan += runs_of("control", seed)
        plan += runs_of("weighted", seed, weight=(0.0, *WEIGHTS, 1.0))
        plan += runs_of("modpo", seed, weight=WEIGHTS)
    return plan


def quick_plan(seeds: int = 2) -> list[Run]:
    """The first figures, with fewer seeds and values.

    Raises:
        ValueError: seeds is not positive.
    """
    if seeds < 1:
        raise ValueError(f"seeds should be at least 1, got {seeds}")
    plan = truths("plain")
    for seed in range(seeds):
        plan += runs_of("dpo", seed, labels=LABELS[:1], beta=(0.1, 1.0, 5.0))
        plan += runs_of("dpo", seed, labels=LABELS[1:], beta=(1.0,))
        plan += runs_of("ppo_learned", seed, target_kl=TARGET_KLS[:2])
        plan += runs_of("ppo_true", seed, target_kl=TARGET_KLS[:2])
        plan += runs_of("preferred_ft", seed)
    return plan


def trl_plan(seeds: int = 3) -> list[Run]:
    """What needs TRL.

    Raises:
        ValueError: seeds is not positive.
    """
    if seeds < 1:
        raise ValueError(f"seeds should be at least 1, got {seeds}")
    return [run for seed in range(seeds) for run in runs_of("rloo", seed, beta=RLOO_BETAS)]


def check_plan(plan: Sequence[Run]) -> None:
    """
    Raises:
        ValueError: the plan is empty, has a run twice, or one that needs what is not installed.
    """
    names = [run.name for run in plan]
    if not names:
        raise ValueError("plan should have at least one run")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"plan should have each run once, got {', '.join(twice)} twice")
    if any(run.method == "rloo" for run in plan) and not all(map(find_spec, ("trl", "datasets"))):
        raise ValueError("plan should be without rloo, which needs trl: pip install 'fastdpo[trl]'")
