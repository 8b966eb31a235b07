"""Every figure of the study, from the records alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import figures_caveats, figures_frontier, figures_further
from .canvas import styled
from .results import Results

# name of the picture -> (how it is drawn, the methods whose records it needs)
FIGURES: dict[str, tuple[Callable[[Results], Any], tuple[str, ...]]] = {
    "frontier": (figures_frontier.frontier, ("dpo", "ppo_learned", "ppo_true", "preferred_ft")),
    "temperature": (figures_frontier.temperature, ("dpo", "ppo_learned", "ppo_true")),
    "gradient_weight": (figures_frontier.gradient_weight, ("dpo",)),
    "objectives": (figures_frontier.objectives, ("ipo", "cdpo", "kto", "simpo", "apo_zero")),
    "flipped": (figures_caveats.flipped, ("flipped", "dpo", "ipo")),
    "cycle": (figures_caveats.cycle, ("cycle",)),
    "references": (figures_caveats.references, ("reference",)),
    "length": (figures_caveats.length, ("length",)),
    "strategies": (figures_further.strategies, ("strategy",)),
    "control": (figures_further.control, ("control",)),
    "two_rewards": (figures_further.two_rewards, ("weighted", "modpo")),
}


def draw(results: Results, folder: Path) -> list[str]:
    """Writes NAME.png for every figure that there are records for; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {record["method"] for record in results.records}
    drawn = []
    for name, (function, needed) in FIGURES.items():
        if there.issuperset(needed):
            with styled() as plt:
                figure = function(results)
                figure.savefig(folder / f"{name}.png", dpi=110)
                plt.close(figure)
            drawn.append(name)
    return drawn
