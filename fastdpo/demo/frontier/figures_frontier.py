"""The paper's own figures: the frontier, the temperatures, the gradient's weight; and the frontier
of other objectives."""

from __future__ import annotations

from typing import Any

from .canvas import (
    BLUE,
    GOLD,
    GRAY,
    GREEN,
    INK,
    PINK,
    RED,
    SHADES,
    TEAL,
    VIOLET,
    along_training,
    band,
    exact_frontier,
    final_points,
    panels,
)
from .results import Record, Results

KL_LABEL = "KL(π ‖ π_ref), nats, exact"
REWARD_LABEL = "expected reward, exact"


def frontier(results: Results) -> Any:
    figure, (left, right) = panels(results, "Reward against KL", 2, 6.6)
    truth = results.truth("plain")
    for ax in (left, right):
        exact_frontier(ax, truth["frontier"], "exact optimal frontier")
        ax.set(xlabel=KL_LABEL, ylabel=REWARD_LABEL)
    best = truth["best_of_n"]
    left.plot(
        [p["kl"] for p in best],
        [p["reward"] for p in best],
        color=GRAY,
        marker="D",
        markersize=4,
        linewidth=1,
        linestyle=":",
        label=f"best of N, exact (N up to {best[-1]['n']})",
    )
    lines = [
        ("dpo", "beta", "DPO, labels by reward", BLUE, "o"),
        ("ppo_learned", "target_kl", "PPO, learned reward", RED, "s"),
        ("ppo_true", "target_kl", "PPO, true reward", GOLD, "^"),
        ("rloo", "beta", "RLOO (TRL), true reward", PINK, "X"),
        ("unlikelihood", "alpha", "unlikelihood", VIOLET, "v"),
        ("preferred_ft", None, "preferred fine-tuning", GREEN, "P"),
    ]
    for method, knob, label, color, marker in lines:
        given = {"labels": "reward"} if method == "dpo" else {}
        if knob is None:
            groups = [results.of(method)]
        else:
            values = results.values(method, knob, **given)
            groups = [results.of(method, **given, **{knob: value}) for value in values]
        if not any(groups):
            continue
        along_training(left, [record for group in groups for record in group], color)
        final_points(left, groups, color, label, marker)
    left.set_title("Methods (small points: along training)")
    left.set_ylim(bottom=-1.1)
    left.legend(loc="lower right", ncols=2)
    _against_optimum(right, results)
    return figure


def _against_optimum(ax: Any, results: Results) -> None:
    """Each β's trained policies, and the optimum that the labels' distribution implies."""
    optimum = {point["beta"]: point for point in results.truth("plain")["optimum"]}
    for color, beta in zip(
        SHADES, results.values("dpo", "beta", labels="bradley_terry"), strict=False
    ):
        group = results.of("dpo", labels="bradley_terry", beta=beta)
        point = optimum[beta]
        end = [sum(r["curve"][-1][axis] for r in group) / len(group) for axis in ("kl", "reward")]
        ax.plot([point["kl"], end[0]], [point["reward"], end[1]], color=GRAY, lw=1, ls="--")
        along_training(ax, group, color)
        final_points(ax, [group], color, f"DPO, β = {beta:g}")
        ax.plot(point["kl"], point["reward"], marker="x", markersize=9, mew=2, color=color, ls="")
    ax.plot([], [], marker="x", color=INK, ls="", mew=2, label="exact optimum of that β")
    ax.set_title("DPO on Bradley–Terry labels, whose optimum is known")
    ax.legend(loc="lower right")


def temperature(results: Results) -> Any:
    figure, axes = panels(results, "Win rate against sampling temperature", 2)
    rows = [
        ("DPO, β = 0.1", results.of("dpo", labels="reward", beta=0.1), BLUE),
        ("DPO, β = 1", results.of("dpo", labels="reward", beta=1.0), TEAL),
        ("PPO, learned reward, KL 6", results.of("ppo_learned", target_kl=6.0), RED),
        ("PPO, true reward, KL 6", results.of("ppo_true", target_kl=6.0), GOLD),
        ("unlikelihood, α = 0.5", results.of("unlikelihood", alpha=0.5), VIOLET),
        ("preferred fine-tuning", results.of("preferred_ft"), GREEN),
    ]
    sides = (
        ("against_reference", "Against the fine-tuned model's answers (temperature 1)"),
        ("against_chosen", "Against the chosen answers"),
    )
    for ax, (key, title) in zip(axes, sides, strict=True):
        ax.axhline(0.5, color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
        for label, records, color in rows:
            if records:
                xs = [row["temperature"] for row in records[0]["win_rates"]]
                values = [[row[key] for row in record["win_rates"]] for record in records]
                band(ax, xs, values, color, label, marker="o", markersize=4)
        own = results.truth("plain")["win_rates"]
        ax.plot(
            [row["temperature"] for row in own],
            [row[key] for row in own],
            color=INK,
            linestyle=":",
            marker="o",
            markersize=4,
            label="the fine-tuned model itself",
        )
        ax.set(title=title, xlabel="sampling temperature", ylabel="win rate, exact", ylim=(0, 1.02))
    axes[0].legend(loc="lower left")
    return figure


def gradient_weight(results: Results) -> Any:
    labels = [name for name in ("reward", "bradley_terry") if results.of("dpo", labels=name)]
    title = r"The gradient's weight $\sigma(\hat{r}_l - \hat{r}_w)$"
    figure, axes = panels(results, title, len(labels))
    names = {"reward": "Labels by the higher reward", "bradley_terry": "Bradley–Terry labels"}
    for ax, label in zip(axes, labels, strict=True):
        ax.axhline(0.5, color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
        for color, beta in zip(SHADES, results.values("dpo", "beta", labels=label), strict=False):
            records = results.of("dpo", labels=label, beta=beta)
            xs = [row["step"] for row in records[0]["training"]]
            rows = [[row["weight"] for row in record["training"]] for record in records]
            band(ax, xs, rows, color, f"β = {beta:g}")
        ax.set(title=names[label], xlabel="optimizer step", ylabel="mean weight of a batch")
        ax.set_ylim(0, 0.62)
        ax.legend(loc="lower left")
    return figure


def objectives(results: Results) -> Any:
    figure, (ax,) = panels(results, "The frontier of other objectives, on the same pairs", 1, 8.6)
    exact_frontier(ax, results.truth("plain")["frontier"], "exact optimal frontier")
    rows = [
        ("dpo", "sigmoid (DPO)", BLUE, "o"),
        ("ipo", "IPO", RED, "s"),
        ("cdpo", "cDPO, ε = 0.1", GOLD, "^"),
        ("kto", "KTO", GREEN, "v"),
        ("simpo", "SimPO (no reference)", VIOLET, "D"),
        ("apo_zero", "APO-zero", PINK, "P"),
    ]
    for method, label, color, marker in rows:
        given = {"labels": "reward"} if method == "dpo" else {}
        betas = results.values(method, "beta", **given)
        groups: list[list[Record]] = [results.of(method, **given, beta=beta) for beta in betas]
        along_training(ax, [record for group in groups for record in group], color)
        named = ", ".join(f"{beta:g}" for beta in betas)
        final_points(ax, groups, color, f"{label}, β = {named}", marker)
    ax.set(xlabel=KL_LABEL, ylabel=REWARD_LABEL)
    ax.set_title("At the end of training (small points: along it)")
    ax.legend(loc="lower right")
    return figure
