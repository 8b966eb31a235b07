"""What is built on DPO: data strategies, a control token, two rewards."""

from __future__ import annotations

from typing import Any

from .canvas import (
    BLUE,
    GOLD,
    GRAY,
    GREEN,
    INK,
    RED,
    band,
    exact_frontier,
    panels,
)
from .figures_frontier import KL_LABEL, REWARD_LABEL
from .results import Results, at_end, spread

STRATEGIES = (
    ("offline", "offline, all six pairs of four answers", BLUE, "o"),
    ("best_against_worst", "offline, best against worst of four", GREEN, "^"),
    ("iterated", "iterated: answers of the current policy", RED, "s"),
)


def strategies(results: Results) -> Any:
    samples = results.of("strategy", strategy="offline")[0]["budget"]["samples"]
    title = f"Where the pairs come from, {samples:,} answers each; DPO, β = 0.1"
    figure, (left, right) = panels(results, title, 2)
    exact_frontier(left, results.truth("plain")["frontier"], "exact optimal frontier")
    for name, label, color, marker in STRATEGIES:
        records = results.of("strategy", strategy=name)
        for record in records:
            xs, ys = ([point[axis] for point in record["curve"]] for axis in ("kl", "reward"))
            left.plot(xs, ys, color=color, lw=1, alpha=0.6, marker=marker, markersize=4)
        left.plot([], [], color=color, marker=marker, label=label)
        xs = [point["step"] for point in records[0]["curve"]]
        rows = [[point["reward"] for point in record["curve"]] for record in records]
        band(right, xs, rows, color, label, marker=marker, markersize=4)
    left.set(xlabel=KL_LABEL, ylabel=REWARD_LABEL)
    left.set_title("Paths of training, a line for each seed")
    left.legend(loc="lower right")
    right.set(xlabel="optimizer step", ylabel=REWARD_LABEL)
    right.set_title("Reward along training")
    return figure


def control(results: Results) -> Any:
    truth, records = results.truth("controls"), results.of("control")
    title = "A control token in the prompt turns the preference round"
    figure, (ax,) = panels(results, title, 1, 8.6)
    width = 0.36
    for side, (label, color) in enumerate((("praise asked for", GREEN), ("a slating", RED))):
        offset = (side - 0.5) * width
        trained = spread(record["sentiment"][side] for record in records)
        values = [truth["reference"][side], trained[0], truth["best"][side]]
        xs = [place + offset for place in range(3)]
        ax.bar(xs, values, width, color=color, label=label)
        low, high = trained[0] - trained[1], trained[2] - trained[0]
        ax.errorbar(xs[1], trained[0], [[low], [high]], color=INK, capsize=3)
    ax.axhline(0, color=GRAY, linewidth=1)
    ax.set_xticks(range(3), ["the reference, exact", "DPO, trained", "the best answers"])
    ax.set(ylabel="expected sentiment of the answers, exact")
    ax.set_title(f"The token alone says which sentiment is chosen; DPO, β = {truth['beta']:g}")
    ax.legend(title="control token", loc="upper left")
    ax.grid(axis="x", visible=False)
    return figure


def two_rewards(results: Results) -> Any:
    truth = results.truth("two_rewards")
    title = f"A blend of two rewards, β = {truth['beta']:g}"
    figure, (ax,) = panels(results, title, 1, 8.6)
    points = truth["frontier"]
    ax.plot(
        [p["variety"] for p in points],
        [p["reward"] for p in points],
        color=INK,
        linewidth=1.6,
        label="exact optimum of every blend",
    )
    marks = {p["weight"]: p for p in points}
    for method, label, color, marker in (
        ("weighted", "DPO, labels by the weighted reward", BLUE, "o"),
        ("modpo", "MODPO: labels by sentiment, variety as margin", GOLD, "s"),
    ):
        for place, weight in enumerate(results.values(method, "weight")):
            group = results.of(method, weight=weight)
            best = marks[weight]
            x, y = at_end(group, "variety"), at_end(group, "reward")
            ax.plot([best["variety"], x[0]], [best["reward"], y[0]], color=GRAY, lw=0.8, ls="--")
            ax.plot(best["variety"], best["reward"], marker="x", color=INK, mew=2, ls="", ms=8)
            ax.errorbar(
                x[0],
                y[0],
                xerr=[[x[0] - x[1]], [x[2] - x[0]]],
                yerr=[[y[0] - y[1]], [y[2] - y[0]]],
                color=color,
                marker=marker,
                capsize=2,
                ls="",
                label=label if place == 0 else None,
            )
            if method == "weighted":
                ax.annotate(
                    f"w = {weight:g}",
                    (best["variety"], best["reward"]),
                    textcoords="offset points",
                    xytext=(8, 8),
                    fontsize=9,
                )
    start = truth["reference"]
    style = {"marker": "*", "ms": 11, "color": GRAY, "ls": "", "label": "reference"}
    ax.plot(start["variety"], start["reward"], **style)
    ax.set(xlabel="expected variety (2/3 for each different word), exact")
    ax.set(ylabel="expected sentiment, exact")
    ax.set_title("w · sentiment + (1 − w) · variety (crosses: exact optimum of that w)")
    ax.legend(loc="upper right")
    ax.margins(0.1, 0.14)
    return figure
