"""The first figure in numbers: every method at the end of its training, and what it cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .results import Results, at_end, spread

SHOWN = ("dpo", "ppo_learned", "ppo_true", "rloo", "unlikelihood", "preferred_ft")
COLUMNS = (
    "method",
    "KL",
    "reward",
    "at most",
    "steps",
    "answers drawn",
    "rewards asked for",
    "CPU s",
)


def rows(results: Results) -> list[tuple[str, ...]]:
    """One for each method and its knobs, as COLUMNS: means over seeds, the reward's least and
    greatest in brackets; "at most" is the exact frontier's reward at that KL, and CPU seconds are
    those of training, evaluation left out."""
    frontier = results.truth("plain")["frontier"]
    named = dict.fromkeys(
        (record["method"], *record["knobs"].items())
        for record in results.records
        if record["method"] in SHOWN
    )
    table: list[tuple[str, ...]] = []
    for method, *knobs in sorted(named, key=lambda row: (SHOWN.index(row[0]), row[1:])):
        group = results.of(method, **dict(knobs))
        (kl, *_), (reward, low, high) = at_end(group, "kl"), at_end(group, "reward")
        budgets = [record["budget"] for record in group]
        cpu = spread(
            record["budget"]["training_cpu_seconds"]
            + record.get("reward_model_budget", {}).get("cpu_seconds", 0.0)
            for record in group
        )
        words = [value if name == "labels" else f"{name} {value:g}" for name, value in knobs]
        given = ", ".join(words)
        table.append(
            (
                f"{method} ({given})" if given else method,
                f"{kl:.2f}",
                f"{reward:.2f} [{low:.2f}, {high:.2f}]",
                f"{most_reward(frontier, kl):.2f}",
                str(budgets[0]["optimizer_steps"]),
                f"{budgets[0]['samples']:,}",
                f"{budgets[0]['reward_calls']:,}",
                f"{cpu[0]:.1f}",
            )
        )
    return table


def markdown(results: Results) -> str:
    """`rows` as a table of the documentation."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows(results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def most_reward(frontier: Sequence[dict[str, float]], kl: float) -> float:
    """The frontier's reward at this KL, by straight lines between its points."""
    points = sorted((point["kl"], point["reward"]) for point in frontier)
    if kl <= points[0][0]:
        return points[0][1]
    for (below, low), (above, high) in itertools.pairwise(points):
        if below < kl <= above:
            return low + (high - low) * (kl - below) / (above - below)
    return points[-1][1]
