"""The sweep of `workspace_bytes` in the terminal, in docs/benchmarks.md and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.environment import describe
from benchmarks.report.markdown import line, source
from benchmarks.report.plotting import EAGER, OURS, plt, save
from benchmarks.report.terminal import amount, console, duration, spread
from benchmarks.scenarios import Scenario
from benchmarks.workspace.limits import by_dtype


def table(
    scenario: Scenario,
    rows: list[dict[str, Any]],
    promises: list[dict[str, Any]],
    hardware: str,
) -> None:
    table = Table(title=f"{scenario.name} · {hardware}")
    for name in ("workspace", "time", "20% – 80%", "× floor", "extra memory"):
        table.add_column(name, justify="left" if name == "workspace" else "right")
    for r in rows:
        table.add_row(
            r["provider"],
            duration(r["seconds"]["median"]),
            spread(r["seconds"]),
            f"{r['multiple_of_floor']:.2f}",
            amount(r["extra_bytes"]),
        )
    console.print(table)
    for p in promises:
        sign = "≤" if p["kept"] else ">"
        colour = "green" if p["kept"] else "red"
        console.print(f"  {p['promise']} [{colour}]{p['measured']:.3f} {sign} {p['limit']:.3g}[/]")


def markdown(doc: dict[str, Any]) -> str:
    first = doc["results"][0]["scenario"]
    lines = [
        f"**Time and memory against the workspace**, V {first['vocab_size']:,}, "
        f"D {first['hidden_size']:,}, {first['loss_tokens']:,} tokens. " + source(doc),
        "",
        line("dtype", "workspace", "time", "× floor", "extra memory"),
        line("---", "---", "---:", "---:", "---:"),
    ]
    for r in doc["results"]:
        cells = duration(r["seconds"]["median"]), f"{r['multiple_of_floor']:.2f}"
        lines.append(line(r["scenario"]["dtype"], r["provider"], *cells, amount(r["extra_bytes"])))
    lines.append("")
    for dtype, promises in by_dtype(doc["results"]).items():
        told = (
            f"{p['promise']} {p['measured']:.2f} (at most {p['limit']:.3g}: "
            f"{'kept' if p['kept'] else '**not kept**'})"
            for p in promises
        )
        lines.append(f"{dtype}: {'; '.join(told)}.\n")
    return "\n".join(lines).strip()


def plot(doc: dict[str, Any], path: Path) -> None:
    """Time and extra memory against the workspace, one column of panels per dtype."""
    dtypes = list(dict.fromkeys(r["scenario"]["dtype"] for r in doc["results"]))
    figure, axes = plt.subplots(
        2, len(dtypes), figsize=(4.6 * len(dtypes), 5.6), sharex="col", squeeze=False
    )
    for column, dtype in enumerate(dtypes):
        rows = [r for r in doc["results"] if r["scenario"]["dtype"] == dtype]
        _panels(axes[:, column], rows, dtype)
    scenario = doc["results"][0]["scenario"]
    figure.suptitle(
        f"V {scenario['vocab_size']:,}, D {scenario['hidden_size']:,}, "
        f"{scenario['loss_tokens']:,} tokens\n{describe(doc['environment'])}",
        fontsize=9,
    )
    save(figure, path)


def _panels(axes: Any, rows: list[dict[str, Any]], dtype: str) -> None:
    scenario = rows[0]["scenario"]
    bytes_of_e = scenario["loss_tokens"] * scenario["vocab_size"] * (4 if dtype == "fp32" else 2)
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
