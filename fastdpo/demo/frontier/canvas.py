"""How the figures look, and the shapes that several of them draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .results import Record, Results

BLUE, RED, GREEN, GRAY, INK = "#2f6fb5", "#c8553d", "#3c8d5a", "#9aa0a6", "#26292c"
GOLD, VIOLET, TEAL, PINK = "#c99a2e", "#7d5ba6", "#2b9aa0", "#c2588f"
SHADES = ("#1b3f6b", "#2f6fb5", "#5fb0a8", "#c99a2e")  # of one method's strengths


@contextmanager
def styled() -> Iterator[Any]:
    """matplotlib without a window, in the demo's style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": GRAY,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e8ea",
        "axes.axisbelow": True,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": True,
        "legend.framealpha": 0.85,
        "legend.edgecolor": "white",
        "legend.fontsize": 9,
    }
    with plt.rc_context(style):
        yield plt


def panels(results: Results, title: str, columns: int, width: float = 6.0) -> tuple[Any, Any]:
    """A figure and its axes, the number of seeds under the title."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, 4.8), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    sizes = results.header["settings"]
    note = f"V = {sizes['vocab_size']}, L = {sizes['length']}; one seed"
    if results.seeds > 1:
        note = (
            f"V = {sizes['vocab_size']}, L = {sizes['length']}; {results.seeds} seeds: "
            "their mean, and bars or bands from the least to the greatest"
        )
    left = 0.07 / (width * columns)  # inches
    figure.suptitle(f"{title}\n", x=left, ha="left", fontsize=13, fontweight="bold")
    figure.text(left, 0.93, note, fontsize=9, color="#5f6368", va="top")
    return figure, axes[0]


def final_points(
    ax: Any, groups: Sequence[list[Record]], color: str, label: str, marker: str = "o"
) -> None:
    """Reward against KL at the end of training: one point for each group of seeds, joined."""
    groups = [group for group in groups if group]
    points = []
    for group in groups:
        ends = [record["curve"][-1] for record in group]
        points.append([[end[axis] for end in ends] for axis in ("kl", "reward")])
    xs = [sum(p[0]) / len(p[0]) for p in points]
    ys = [sum(p[1]) / len(p[1]) for p in points]
    ax.errorbar(
        xs,
        ys,
        xerr=[
            [x - min(p[0]) for x, p in zip(xs, points, strict=True)],
            [max(p[0]) - x for x, p in zip(xs, points, strict=True)],
        ],
        yerr=[
            [y - min(p[1]) for y, p in zip(ys, points, strict=True)],
            [max(p[1]) - y for y, p in zip(ys, points, strict=True)],
        ],
        color=color,
        marker=marker,
        markersize=6,
        linewidth=1,
        elinewidth=1,
        capsize=2,
        label=label,
        zorder=3,
    )


def along_training(ax: Any, records: list[Record], color: str) -> None:
    """Faint points of every evaluation of every seed."""
    xs = [point["kl"] for record in records for point in record["curve"]]
    ys = [point["reward"] for record in records for point in record["curve"]]
    ax.scatter(xs, ys, s=9, color=color, alpha=0.3, linewidth=0, zorder=2)


def exact_frontier(ax: Any, points: list[dict[str, float]], label: str = "exact optimum") -> None:
    ax.plot(
        [p["kl"] for p in points],
        [p["reward"] for p in points],
        color=INK,
        linewidth=1.6,
        label=label,
        zorder=1,
    )


def band(
    ax: Any,
    xs: Sequence[float],
    rows: Sequence[Sequence[float]],  # one row for each seed
    color: str,
    label: str,
    **style: Any,
) -> None:
    """The mean over seeds, and a band from the least to the greatest."""
    columns = list(zip(*rows, strict=True))
    ax.plot(xs, [sum(c) / len(c) for c in columns], color=color, label=label, **style)
    ax.fill_between(
        xs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, lw=0
    )
