"""What the plots of docs/benchmarks.md share. Each is drawn from a document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, EAGER, PEER = "#c0392b", "#7f8c8d", "#2c7fb8"


def colour(provider: str) -> str:
    if provider.startswith("fastdpo"):
        return OURS
    return {"products": "black", "eager": EAGER}.get(provider, PEER)


def token_ticks(axis: Any, tokens: set[int]) -> None:
    """A tick where something was measured, and nowhere else."""
    axis.set_xticks(sorted(tokens), [f"{t:,}" for t in sorted(tokens)])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
