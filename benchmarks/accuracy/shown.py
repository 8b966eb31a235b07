"""Errors in the terminal, in docs/benchmarks.md and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.environment import describe
from benchmarks.report.markdown import line, number, peers, source
from benchmarks.report.plotting import OURS, plt, save, token_ticks
from benchmarks.report.terminal import console
from benchmarks.scenarios import Scenario

# In the table though they be nobody's best form: what 16 bits of log-probabilities cost.
_WRONG = ("trl-selective", "torch-lce", "torch-lce-sum")


def table(scenario: Scenario, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{scenario.name} · sequences of {scenario.length:,} tokens")
    names = ("provider", "token max", "token rms", "sequence max", "∂hidden rms", "∂weight rms")
    for name in (*names, "margin at start", "rule"):
        table.add_column(name, justify="left" if name in ("provider", "rule") else "right")

    def cell(row: dict[str, Any], key: str, norm: str) -> str:
        value = (row.get(key) or {}).get(norm)
        return "" if value is None else f"{value:.1e}"

    for r in rows:
        if r["status"] != "ok":
            table.add_row(r["provider"], *[""] * 6, f"{r['status']}: {r['reason']}")
            continue
        margin = r["margin_at_initialisation"]
        table.add_row(
            r["provider"],
            cell(r, "token_nats", "max"),
            cell(r, "token_nats", "rms"),
            cell(r, "sequence_nats", "max"),
            cell(r, "hidden_relative", "rms"),
            cell(r, "weight_relative", "rms"),
            "not finite" if margin is None else f"{margin:.1e}" if margin else "0",
            "[green]kept[/]" if r["passes"] else f"[red]broken[/]: {r['broken'][0]}",
        )
    console.print(table)


def markdown(doc: dict[str, Any]) -> str:
    measured = [r for r in doc["results"] if r["status"] == "ok"] or doc["results"]
    longest: dict[bool, int] = {}  # of a peaked softmax, and of a flat one
    for r in measured:
        s = r["scenario"]
        longest[s["peaked"]] = max(longest.get(s["peaked"], 0), s["tokens"])
    rows = [r for r in measured if r["scenario"]["tokens"] == longest[r["scenario"]["peaked"]]]
    scenario = rows[0]["scenario"]
    lines = [
        f"**Accuracy** against {rows[0]['oracle']}, {scenario['head']}, {scenario['dtype']}: the "
        "longest pair measured of each softmax, by the tokens of one sequence. " + source(doc),
        "",
        line(
            *("provider", "softmax", "nats per token, RMS", "nats per sequence, largest"),
            *("∂hidden, relative RMS", "∂weight, relative RMS", "margin at initialisation", "rule"),
        ),
        line("---", "---", *["---:"] * 5, "---"),
    ]
    for r in rows:
        if r["status"] != "ok" or r["provider"] not in (*peers(doc), *_WRONG):
            continue
        cells = (
            number(r.get("token_nats"), "rms"),
            number(r["sequence_nats"], "max"),
            number(r.get("hidden_relative"), "rms"),
            number(r.get("weight_relative"), "rms"),
        )
        margin = r["margin_at_initialisation"]
        start = "not finite" if margin is None else "0" if margin == 0 else f"{margin:.1e}"
        s = r["scenario"]
        kind = "peaked" if s["peaked"] else "flat"
        kind += f", {s['tokens'] // s['sequences']:,}"
        rule = "kept" if r["passes"] else "**broken**"
        lines.append(line(f"`{r['provider']}`", kind, *cells, start, rule))
    return "\n".join(lines)


def plot(doc: dict[str, Any], path: Path) -> None:
    """The largest error of a sequence's log-probability against its length."""
    kinds = list(dict.fromkeys(r["scenario"]["peaked"] for r in doc["results"]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.8 * len(kinds), 3.6), squeeze=False)
    for axis, peaked in zip(axes[0], kinds, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for r in doc["results"]:
            s = r["scenario"]
            shown = not r["provider"].startswith("fastdpo-")  # its variants differ in no digit
            shown = shown and r["status"] == "ok" and s["peaked"] == peaked
            if shown and r["sequence_nats"]["max"]:
                point = (s["tokens"] // s["sequences"], r["sequence_nats"]["max"])
                lines.setdefault(r["provider"], []).append(point)
        for name, points in lines.items():
            style = {"color": OURS, "lw": 2.2} if name == "fastdpo" else {"lw": 1.0}
            axis.plot(*zip(*sorted(points), strict=True), "o-", ms=3, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="tokens of the sequence")
        token_ticks(axis, {length for points in lines.values() for length, _ in points})
        axis.set_title(
            "a trained model's softmax" if peaked else "a nearly flat softmax", fontsize=9
        )
        axis.set_ylabel("largest error of a sequence, nats")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    scenario = doc["results"][0]["scenario"]
    figure.suptitle(
        f"{scenario['head']}, {scenario['dtype']}\n{describe(doc['environment'])}", fontsize=8
    )
    save(figure, path)
