"""Training steps in the terminal, in docs/benchmarks.md, and their loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.environment import describe
from benchmarks.report.markdown import line, source
from benchmarks.report.plotting import EAGER, OURS, PEER, plt, save
from benchmarks.report.terminal import amount, console, duration, spread


def table(rows: list[dict[str, Any]], how: dict[str, Any]) -> None:
    lengths = how["lengths"]
    table = Table(
        title=f"{rows[0]['model']}, {rows[0]['batch_size']} pairs per step, {how['shape']} "
        f"(mean prompt {lengths['mean_prompt']:.0f}, completion {lengths['mean_completion']:.0f})"
    )
    for name in ("loop", "step", "20% – 80%", "pairs / s", "peak memory", "loss − eager's", "note"):
        table.add_column(name, justify="left" if name in ("loop", "note") else "right")
    for r in rows:
        if r["status"] != "ok":
            table.add_row(r["provider"], *[""] * 5, f"{r['status']}: {r['reason']}")
            continue
        difference = r.get("largest_loss_difference")
        table.add_row(
            r["provider"],
            duration(r["seconds"]["median"]),
            spread(r["seconds"]),
            f"{r['pairs_per_second']:.2f}",
            amount(r["peak_bytes"]),
            "" if difference is None else f"{difference:.1e}",
            "",
        )
    console.print(table)


def markdown(doc: dict[str, Any]) -> str:
    how, first = doc["protocol"], doc["results"][0]
    lengths = how["lengths"]
    lines = [
        f"**A whole training step**: {first['model']}, {first['batch_size']} pairs per step, "
        f"{how['shape']} lengths (mean prompt {lengths['mean_prompt']:.0f}, mean completion "
        f"{lengths['mean_completion']:.0f} tokens), {how['precision']}. " + source(doc),
        "",
        line("loop", "step", "pairs / s", "peak memory", "largest difference from eager's loss"),
        line("---", *["---:"] * 4),
    ]
    absent = []
    for r in doc["results"]:
        if r["status"] != "ok":
            absent.append(f"`{r['provider']}` ({r['reason']})")
            continue
        difference = r.get("largest_loss_difference")
        lines.append(
            line(
                f"`{r['provider']}`",
                duration(r["seconds"]["median"]),
                f"{r['pairs_per_second']:.2f}",
                amount(r["peak_bytes"]),
                "" if difference is None else f"{difference:.1e}",
            )
        )
    if absent:
        lines += ["", f"Not here: {'; '.join(absent)}."]
    return "\n".join(lines)


def plot(doc: dict[str, Any], path: Path) -> None:
    """Loss curves of the training loops, over one another where they coincide."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    styles = {
        "fastdpo": ("-", OURS, 3.0),
        "eager": ("--", EAGER, 1.8),
        "trl": (":", PEER, 1.8),
        "trl-fastdpo": ("-.", "black", 1.0),
    }
    for r in doc["results"]:
        if r["status"] == "ok":
            line, colour, width = styles[r["provider"]]
            axis.plot(r["losses"], line, color=colour, lw=width, label=r["provider"])
    axis.set(xlabel="step", ylabel="DPO loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(
        f"{doc['results'][0]['model']}, {doc['protocol']['shape']}\n{describe(doc['environment'])}",
        fontsize=8,
    )
    save(figure, path)
