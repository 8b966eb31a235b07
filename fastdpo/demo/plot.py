"""The run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluate import Evaluation
from .memory import Memory
from .sample import Answers

BLUE, RED, GREEN, GRAY, INK = "#2f6fb5", "#c8553d", "#3c8d5a", "#9aa0a6", "#26292c"
MIB = 2**20


def draw(
    path: Path,
    metrics: Sequence[dict[str, float]],
    evaluations: Sequence[tuple[int, Evaluation]],
    answers: Sequence[Answers],
    memory: Sequence[Memory],
    title: str,
) -> None:
    """Six panels, or five where no memory was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": GRAY,
        "axes.labelcolor": INK,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e8ea",
        "axes.axisbelow": True,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(14, 7.6))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.04)
        figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
        _accuracy(axes[0, 0], evaluations)
        _rewards(axes[0, 1], metrics)
        _loss(axes[0, 2], metrics)
        _flaws(axes[1, 0], evaluations, answers)
        _logps(axes[1, 1], metrics)
        _memory(axes[1, 2], memory)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _accuracy(ax: Any, evaluations: Sequence[tuple[int, Evaluation]]) -> None:
    steps = [step for step, _ in evaluations]
    likelihood = [100 * e.preference_accuracy for _, e in evaluations]
    reward = [100 * e.reward_accuracy for _, e in evaluations]
    ax.axhline(50, color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
    ax.plot(steps, reward, color=GREEN, marker="o", markersize=4, label="by implicit reward")
    ax.plot(steps, likelihood, color=BLUE, marker="o", markersize=4, label="by likelihood")
    ax.set(title="Held-out preference accuracy", xlabel="step", ylabel="%", ylim=(0, 103))
    ax.legend(loc="lower right")


def _rewards(ax: Any, metrics: Sequence[dict[str, float]]) -> None:
    chosen, rejected = _series(metrics, "rewards/chosen"), _series(metrics, "rewards/rejected")
    steps = range(1, len(metrics) + 1)
    ax.axhline(0, color=GRAY, linewidth=1)
    ax.fill_between(steps, rejected, chosen, color=GREEN, alpha=0.10, linewidth=0)
    ax.plot(steps, chosen, color=BLUE, label="chosen")
    ax.plot(steps, rejected, color=RED, label="rejected")
    ax.set(title="Implicit rewards, training batches", xlabel="step", ylabel="β · log π/π_ref")
    ax.legend(loc="best")


def _loss(ax: Any, metrics: Sequence[dict[str, float]]) -> None:
    values = _series(metrics, "loss")
    steps = range(1, len(values) + 1)
    ax.plot(steps, values, color=GRAY, linewidth=1, label="each batch")
    ax.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="smoothed")
    ax.set(title="Loss", xlabel="step")
    ax.set_ylim(bottom=min(0.0, *values))
    ax.legend(loc="upper right")


def _flaws(
    ax: Any, evaluations: Sequence[tuple[int, Evaluation]], answers: Sequence[Answers]
) -> None:
    (_, first), (_, last) = evaluations[0], evaluations[-1]
    rows = [
        (f"{flaw or 'all'} rejected", first.by_flaw[flaw], after)
        for flaw, after in sorted(last.by_flaw.items(), key=lambda item: first.by_flaw[item[0]])
    ]
    if answers[0].share_good is not None and answers[-1].share_good is not None:
        rows.insert(
            0, ("good answers\nwhen sampled", answers[0].share_good, answers[-1].share_good)
        )
    names = [row[0] for row in rows]
    before, after = ([100 * row[side] for row in rows] for side in (1, 2))
    places = range(len(names))
    ax.axvline(50, color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
    ax.hlines(places, before, after, color=GRAY, linewidth=2, zorder=1)
    ax.scatter(before, places, color=GRAY, s=55, label="before", zorder=2)
    ax.scatter(after, places, color=BLUE, s=55, label="after", zorder=3)
    ax.set_yticks(places, names)
    ax.set(xlim=(-3, 103), ylim=(-0.6, len(names) - 0.4), xlabel="%")
    ax.set_title("Held-out pairs, by what is wrong")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper left")


def _logps(ax: Any, metrics: Sequence[dict[str, float]]) -> None:
    steps = range(1, len(metrics) + 1)
    for name, color in (("chosen", BLUE), ("rejected", RED)):
        values = _series(metrics, f"logps/{name}")
        ax.plot(steps, values, color=color, linewidth=1, alpha=0.35)
        ax.plot(steps, _smooth(values), color=color, linewidth=2, label=name)
    ax.set(title="Log-probability of the answers", xlabel="step", ylabel="nats")
    ax.legend(loc="lower left")


def _memory(ax: Any, memory: Sequence[Memory]) -> None:
    if not memory:
        ax.set_axis_off()
        return
    names = [f"{m.label}\nV = {m.vocab_size:,}" for m in memory]
    width = 0.36
    for offset, color, label in ((-width / 2, GRAY, "eager"), (width / 2, BLUE, "fastdpo")):
        values = [getattr(m, label) / MIB for m in memory]
        bars = ax.bar(
            [place + offset for place in range(len(names))], values, width, color=color, label=label
        )
        ax.bar_label(bars, [f"{value:,.0f}" for value in values], padding=2)
    ax.set_xticks(range(len(names)), names)
    ax.set(title="Peak memory of one training step", ylabel="MiB beyond the weights")
    ax.set_xlim(-0.7, max(1, len(names)) - 0.3)
    ax.margins(y=0.12)
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left")


def _series(metrics: Sequence[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in metrics]


def _smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """An exponential average that starts unbiased."""
    out, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1.0
        out.append(total / mass)
    return out
