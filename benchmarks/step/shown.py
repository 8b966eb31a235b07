"""Training steps in the terminal, in docs/benchmarks.md, and what each part of them is worth."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.environment import describe
from benchmarks.report.markdown import line, source
from benchmarks.report.plotting import EAGER, OURS, PEER, plt, save
from benchmarks.report.terminal import amount, console, duration, spread
from benchmarks.step.loops import LOOPS, WATERFALL

_STYLES = {
    "eager": ("--", EAGER, 1.8),
    "trl": (":", PEER, 1.8),
    "trl-fastdpo": ("-.", "black", 1.0),
    "fastdpo": ("-", OURS, 3.0),
    "reference-once": ("-", OURS, 2.0),
    "packed": ("-", OURS, 1.2),
    "shared-prompts": ("-", OURS, 0.8),
    "token-budget": ("-", OURS, 0.5),
}


def table(rows: list[dict[str, Any]], how: dict[str, Any]) -> None:
    lengths = how["lengths"]
    table = Table(
        title=f"{rows[0]['model']}, {rows[0]['batch_size']} pairs per step, {how['shape']} "
        f"(mean prompt {lengths['mean_prompt']:.0f}, completion {lengths['mean_completion']:.0f})"
    )
    names = ("loop", "step", "20% – 80%", "pairs / s", "tokens / s", "× baseline", "peak memory")
    for name in (*names, "loss − eager's", "note"):
        table.add_column(name, justify="left" if name in ("loop", "note") else "right")
    for r in rows:
        if r["status"] != "ok":
            table.add_row(r["provider"], *[""] * 7, f"{r['status']}: {r['reason']}")
            continue
        table.add_row(
            r["provider"],
            duration(r["seconds"]["median"]),
            spread(r["seconds"]),
            *_figures(r),
            amount(r["peak_bytes"]),
            _difference(r),
            _once(r),
        )
    console.print(table)


def _figures(r: dict[str, Any]) -> tuple[str, str, str]:
    times = r.get("times_baseline")
    return (
        f"{r['pairs_per_second']:.2f}",
        f"{r['tokens_per_second']:,.0f}",
        "" if times is None else f"{times:.2f}",
    )


def _difference(r: dict[str, Any]) -> str:
    difference = r.get("largest_loss_difference")
    return "" if difference is None else f"{difference:.1e}"


def _once(r: dict[str, Any]) -> str:
    once = r["reference_seconds"]
    return "" if once is None else f"reference of all steps before them: {duration(once)}"


def markdown(doc: dict[str, Any]) -> str:
    how, first = doc["protocol"], doc["results"][0]
    lengths = how["lengths"]
    lines = [
        f"**A whole training step**: {first['model']}, {first['batch_size']} pairs per step, "
        f"{how['shape']} lengths (mean prompt {lengths['mean_prompt']:.0f}, mean completion "
        f"{lengths['mean_completion']:.0f} tokens), {how['precision']}. Times the faster of eager "
        "PyTorch and TRL as it ships; tokens are those of the sequences, without padding. "
        + source(doc),
        "",
        line(
            "loop",
            "what it is",
            "step",
            "pairs / s",
            "tokens / s",
            "times",
            "peak memory",
            "largest difference from eager's loss",
        ),
        line("---", "---", *["---:"] * 6),
    ]
    absent = []
    for r in doc["results"]:
        if r["status"] != "ok":
            absent.append(f"`{r['provider']}` ({r['reason']})")
            continue
        what = r["summary"] + (f" ({_once(r)})" if _once(r) else "")
        lines.append(
            line(
                f"`{r['provider']}`",
                what,
                duration(r["seconds"]["median"]),
                *_figures(r),
                amount(r["peak_bytes"]),
                _difference(r),
            )
        )
    if absent:
        lines += ["", f"Not here: {'; '.join(absent)}."]
    return "\n".join(lines)


def plot(doc: dict[str, Any], path: Path) -> None:
    """What each part is worth, and the loss curves, over one another where they coincide."""
    figure, (parts, curves) = plt.subplots(1, 2, figsize=(12.5, 3.8))
    _waterfall(doc, parts)
    # Ours first: the others lie over it, where they coincide.
    for r in sorted(doc["results"], key=lambda r: r["provider"] not in WATERFALL):
        if r["status"] == "ok":
            style, colour, width = _STYLES[r["provider"]]
            curves.plot(r["losses"], style, color=colour, lw=width, label=r["provider"])
    curves.set(xlabel="step", ylabel="DPO loss")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8)
    figure.suptitle(
        f"{doc['results'][0]['model']}, {doc['protocol']['shape']}\n{describe(doc['environment'])}",
        fontsize=8,
    )
    save(figure, path)


def _waterfall(doc: dict[str, Any], axis: Any) -> None:
    """Pairs per second, as multiples of the baseline: each bar begins where the one before ends."""
    found = {r["provider"]: r for r in doc["results"] if r.get("times_baseline") is not None}
    names = [name for name in ("eager", "trl", *WATERFALL) if name in found]
    before = 0.0
    for place, name in enumerate(names):
        value, ours = found[name]["times_baseline"], name in WATERFALL
        bottom = before if ours and before else 0.0
        colour = OURS if ours else _STYLES[name][1]
        axis.bar(place, value - bottom, bottom=bottom, color=colour, width=0.7)
        axis.text(place, max(value, bottom), f"{value:.2f}", ha="center", va="bottom", fontsize=8)
        before = value if ours else 0.0
    labels = [LOOPS[name].summary if name in WATERFALL else name for name in names]
    axis.set_xticks(range(len(names)), [_wrapped(text) for text in labels], fontsize=7)
    axis.set_ylabel("pairs per second,\n× the faster of eager and TRL", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.12)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text.partition(":")[2].strip() or text, 13))
