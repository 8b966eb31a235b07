"""The README's plots, from a document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.environment import describe

OURS, EAGER, PEER = "#c0392b", "#7f8c8d", "#2c7fb8"


def workspace(doc: dict[str, Any], path: Path) -> None:
    """Time and extra memory against the workspace, one column of panels per dtype."""
    dtypes = list(dict.fromkeys(r["scenario"]["dtype"] for r in doc["results"]))
    figure, axes = plt.subplots(
        2, len(dtypes), figsize=(4.6 * len(dtypes), 5.6), sharex="col", squeeze=False
    )
    for column, dtype in enumerate(dtypes):
        rows = [r for r in doc["results"] if r["scenario"]["dtype"] == dtype]
        _workspace_panels(axes[:, column], rows, dtype)
    scenario = doc["results"][0]["scenario"]
    figure.suptitle(
        f"V {scenario['vocab_size']:,}, D {scenario['hidden_size']:,}, "
        f"{scenario['carrying']:,} tokens\n{describe(doc['environment'])}",
        fontsize=9,
    )
    _save(figure, path)


def _workspace_panels(axes: Any, rows: list[dict[str, Any]], dtype: str) -> None:
    scenario = rows[0]["scenario"]
    bytes_of_e = scenario["carrying"] * scenario["vocab_size"] * (4 if dtype == "fp32" else 2)
    points = [r for r in rows if r["provider"].endswith("of E")]
    x = [
        (bytes_of_e if r["workspace_bytes"] is None else r["workspace_bytes"]) / 2**20
        for r in points
    ]
    named = {r["provider"]: r for r in rows}
    for axis, value, unit in (
        (axes[0], lambda r: r["seconds"]["median"], "seconds per step"),
        (axes[1], lambda r: r["extra_bytes"] / 2**30, "extra memory, GiB"),
    ):
        axis.plot(x, [value(r) for r in points], "o-", color=OURS, label="fastdpo")
        axis.axhline(value(named["eager"]), color=EAGER, ls="--", label="eager PyTorch")
        axis.axhline(value(named["default"]), color=OURS, ls=":", label="fastdpo, default")
        axis.set_ylim(bottom=0)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
    floor = scenario["units"] * rows[0]["t1_seconds"]
    axes[0].axhline(floor, color="black", lw=0.8, label="3 bare products")
    axes[0].set_title(dtype)
    axes[0].legend(fontsize=7)
    axes[1].set_xlabel("workspace, MiB")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
