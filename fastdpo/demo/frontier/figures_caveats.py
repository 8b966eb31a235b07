"""Where preference optimization goes wrong: flipped labels, circles, bad references, length."""

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
    final_points,
    panels,
)
from .figures_frontier import KL_LABEL, REWARD_LABEL
from .plan import FLIP_SHARES
from .results import Record, Results, at_end, spread

CAMPS = (BLUE, GOLD, GREEN)
CAMP_NAMES = ("A: ends in .", "B: in a valued word", "C: in another")


def flipped(results: Results) -> Any:
    """Reward, and how far from what its KL could buy."""
    figure, (left, right) = panels(results, "Labels turned round, β = 0.1", 2)
    shares = (0.0, *FLIP_SHARES)
    rows = [("sigmoid", "sigmoid (DPO)", BLUE, "o"), ("cdpo", "cDPO", GOLD, "^")]
    rows += [("robust", "robust DPO", GREEN, "v"), ("ipo", "IPO", RED, "s")]
    exact_frontier(right, results.truth("plain")["frontier"], "exact optimal frontier")
    for place, (name, label, color, marker) in enumerate(rows):
        groups: list[list[Record]] = []
        for share in shares:
            if share > 0:
                groups.append(results.of("flipped", objective=name, share=share))
            elif name == "ipo":
                groups.append(results.of("ipo", beta=0.1))
            else:  # without flips cDPO and robust DPO are sigmoid
                groups.append(results.of("dpo", labels="reward", beta=0.1))
        found = [(s, g) for s, g in zip(shares, groups, strict=True) if g]
        ends = [at_end(group, "reward") for _, group in found]
        xs = [100 * share + 0.35 * (place - 1.5) for share, _ in found]
        left.errorbar(
            xs,
            [end[0] for end in ends],
            yerr=[[end[0] - end[1] for end in ends], [end[2] - end[0] for end in ends]],
            color=color,
            marker=marker,
            capsize=2,
            label=label,
        )
        final_points(right, [group for _, group in found], color, label, marker)
    left.set(xlabel="labels turned round, %", ylabel=REWARD_LABEL)
    left.set_xticks([100 * share for share in shares])
    left.set_title("Reward at the end")
    left.legend(loc="best")
    right.set(xlabel=KL_LABEL, ylabel=REWARD_LABEL)
    right.set_title("Where it ends (each line: 0, 10, 20 %)")
    right.legend(loc="lower right")
    return figure


def cycle(results: Results) -> Any:
    """Shares of the camps, and how often whoever knows them wins."""
    truth = results.truth("cycle")
    title = "Preferences in a circle: no Bradley–Terry model fits"
    figure, (left, right) = panels(results, title, 2, 7.0)
    # label, exact shares or None, trained runs or none
    columns: list[tuple[str, list[float] | None, list[Record]]] = [
        ("the reference,\nexact", truth["reference"], [])
    ]
    for name, label in (("sigmoid", "DPO"), ("ipo", "IPO")):
        columns.append((f"{label}'s minimum,\nexact", truth[name], []))
        columns.append((f"{label},\ntrained", None, results.of("cycle", objective=name)))
    width = 0.26
    for x, (_, exact, records) in enumerate(columns):
        runs = [exact] if exact is not None else [_shares(record) for record in records]
        alpha = 0.45 if exact is not None else 1.0
        for camp, color in enumerate(CAMPS):
            place = x + (camp - 1) * width
            _bar(left, place, width, [shares[camp] for shares in runs], color, alpha)
        beaten = [_best_answer(shares, truth["strength"]) for shares in runs]
        _bar(right, x, 0.5, beaten, RED, alpha)
    for camp, color in enumerate(CAMPS):
        left.bar(0, 0, color=color, label=CAMP_NAMES[camp])
    left.set_title(
        f"A beats B beats C beats A, {truth['strength']:.0%} of the time; β = {truth['beta']:g}"
    )
    left.set(ylabel="share of the answers", ylim=(0, 1.05))
    left.legend(loc="upper left", ncols=3)
    right.axhline(0.5, color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
    right.set_title("What the best camp wins against it (0.5 at least)")
    right.set(ylabel="win rate of the best response", ylim=(0, 1))
    for ax in (left, right):
        ax.set_xticks(range(len(columns)), [column[0] for column in columns])
        ax.grid(axis="x", visible=False)
    return figure


def _shares(record: Record) -> list[float]:
    return [record["curve"][-1][f"camp{camp}"] for camp in range(3)]


def _best_answer(shares: list[float], strength: float) -> float:
    """The win rate of the camp that wins most often against these shares; each beats the next."""
    return max(
        shares[camp] / 2
        + strength * shares[(camp + 1) % 3]
        + (1 - strength) * shares[(camp + 2) % 3]
        for camp in range(3)
    )


def _bar(ax: Any, x: float, width: float, values: list[float], color: str, alpha: float) -> None:
    mean, low, high = spread(values)
    ax.bar(x, mean, width, color=color, alpha=alpha)
    if len(values) > 1:
        ax.errorbar(x, mean, [[mean - low], [high - mean]], color=INK, capsize=2)


def references(results: Results) -> Any:
    truth = results.truth("references")
    title = f"A badly chosen reference: the same pairs, DPO, β = {truth['beta']:g}"
    figure, (ax,) = panels(results, title, 1, 8.6)
    rows = [
        ("good", "the model that wrote the answers", BLUE, "o"),
        ("flat", "too flat (its logits × 0.4)", GREEN, "v"),
        ("sharp", "too sharp (its logits × 2)", GOLD, "^"),
        ("unlike", "unlike the data (read slatings alone)", RED, "s"),
    ]
    for name, label, color, marker in rows:
        curve = truth["curves"][name]
        ax.plot(
            [p["kl"] for p in curve["frontier"]],
            [p["reward"] for p in curve["frontier"]],
            color=color,
            linewidth=1.2,
            alpha=0.7,
        )
        best = curve["optimum"][0]
        ax.plot(best["kl"], best["reward"], marker="x", ms=9, mew=2, color=color, ls="")
        final_points(ax, [results.of("reference", reference=name)], color, label, marker)
    ax.plot([], [], color=INK, linewidth=1.2, label="exact frontier of that reference")
    ax.plot([], [], color=INK, marker="x", mew=2, ls="", label="its exact optimum at this β")
    ax.set(xlabel="KL(π ‖ its own reference), nats, exact", ylabel=REWARD_LABEL)
    ax.set_title("Trained policies, each against the frontier of its reference")
    ax.legend(loc="lower right")
    return figure


def length(results: Results) -> Any:
    truth = results.truth("stops")
    title = "A labeller who likes long answers"
    figure, (left, right) = panels(results, title, 2)
    rows = [
        ("sigmoid", "sigmoid (DPO), β = 0.1", BLUE),
        ("sigmoid_norm", "length-normalised sigmoid, β = 0.5", GREEN),
        ("simpo", "SimPO, β = 2.5, γ = 0.5", GOLD),
        ("ld_dpo", "LD-DPO, β = 0.1, α = 0.3", RED),
    ]
    for name, label, color in rows:
        records = results.of("length", objective=name)
        for ax, key in ((left, "length"), (right, "reward")):
            xs = [point["step"] for point in records[0]["curve"]]
            values = [[point[key] for point in record["curve"]] for record in records]
            band(ax, xs, values, color, label, marker="o", markersize=4)
    left.axhline(truth["reference_length"], color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
    left.set(xlabel="optimizer step", ylabel="expected words in an answer, exact")
    left.set_title(f"Length (labels: reward + {truth['bias']:g} a word)")
    right.set(xlabel="optimizer step", ylabel="expected true reward, exact")
    right.set_title("The reward that was meant")
    right.legend(loc="best")
    return figure
