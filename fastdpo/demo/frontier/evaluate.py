"""A policy measured exactly, along its training and at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from . import truth
from .models import Tree, enumerate_tree
from .world import World

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Meter:
    """Exact values of a policy at chosen steps, with what it had cost until then.

    values are tables [P, S] (or [S]) whose expectation is recorded beside reward and KL. The clocks
    leave the evaluation itself out.
    """

    world: World
    ref_logps: Tensor  # [P, S] of the policy's reference
    rewards: Tensor  # [P, S]
    values: Mapping[str, Tensor]
    steps: int
    evaluations: int
    samples: int = 0  # drawn until now, from the reference or the policy
    reward_calls: int = 0  # answers whose true reward (or label) was asked for
    curve: list[dict[str, Any]] = field(default_factory=list)
    tree: Tree | None = None  # of the last evaluation
    _spent: float = 0.0
    _cpu_spent: float = 0.0

    def __post_init__(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def due(self, step: int) -> bool:
        """Whether this step (0: before the first) is one to evaluate at."""
        every = self.steps / self.evaluations
        return math.floor(step / every + 1e-9) > math.floor((step - 1) / every + 1e-9)

    def start(self, logps: Tensor) -> None:
        """The point before any step: a policy that is the reference, whose table is known."""
        self.curve.append({"step": 0, **self._exact(logps), "samples": 0, "reward_calls": 0})

    def __call__(self, step: int, policy: nn.Module, **more: float) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        self.tree = enumerate_tree(policy, self.world)
        point = {
            "step": step,
            **self._exact(self.tree.logps()),
            **more,
            "samples": self.samples,
            "reward_calls": self.reward_calls,
            "seconds": start - self._start - self._spent,
            "cpu_seconds": cpu - self._cpu_start - self._cpu_spent,
        }
        self.curve.append(point)
        self._spent += time.perf_counter() - start
        self._cpu_spent += time.process_time() - cpu

    def _exact(self, logps: Tensor) -> dict[str, float]:
        return {
            "reward": truth.mean(logps, self.rewards),
            "kl": truth.kl(logps, self.ref_logps),
            **{name: truth.mean(logps, table) for name, table in self.values.items()},
        }


def win_rates(
    tree: Tree, ref_logps: Tensor, rewards: Tensor, chosen_logps: Tensor
) -> list[dict[str, float]]:
    """Against the reference's own answers and against the chosen ones, at each temperature."""
    rows = []
    for temperature in TEMPERATURES:
        logps = tree.logps(temperature)
        rows.append(
            {
                "temperature": temperature,
                "against_reference": truth.win_rate(logps, ref_logps, rewards),
                "against_chosen": truth.win_rate(logps, chosen_logps, rewards),
                "reward": truth.mean(logps, rewards),
            }
        )
    return rows
