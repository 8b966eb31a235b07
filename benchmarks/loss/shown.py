"""The loss step in the terminal, in docs/benchmarks.md and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.environment import describe
from benchmarks.providers import Provider
from benchmarks.report.markdown import by_scenario, line, peers, source
from benchmarks.report.plotting import OURS, colour, plt, save, token_ticks
from benchmarks.report.terminal import amount, console, duration, spread
from benchmarks.scenarios import Scenario


def table(scenario: Scenario, rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"{scenario.name} · N {scenario.loss_tokens:,}, V {scenario.shape.vocab_size:,}, "
        f"D {scenario.shape.hidden_size:,}, {scenario.units} units"
    )
    for name in ("provider", "time", "20% – 80%", "× floor", "extra memory", "logps error", "note"):
        table.add_column(name, justify="left" if name in ("provider", "note") else "right")
    for r in rows:
        error = r.get("accuracy", {}).get("errors", {}).get("logps", {}).get("max")
        cells = [r["provider"], "", "", "", "", "" if error is None else f"{error:.1e}", ""]
        if r["status"] == "ok":
            cells[1] = duration(r["seconds"]["median"])
            cells[2] = spread(r["seconds"])
            cells[3] = f"{r['multiple_of_floor']:.2f}"
            cells[4] = amount(r["extra_bytes"]) if "extra_bytes" in r else ""
            if r.get("units", scenario.units) > scenario.units:
                cells[6] = "with its reference's forward"
        else:
            cells[6] = f"{r['status']}: {r['reason'].split(';')[0]}"
        table.add_row(*cells, style="bold" if r["provider"] == "fastdpo" else None)
    console.print(table)


def longest_pairs_table(rows: list[dict[str, Any]], limit: int, hardware_line: str) -> None:
    table = Table(title=f"Longest pair within {amount(limit)} · {hardware_line}")
    for name in ("provider", "tokens", "note"):
        table.add_column(name, justify="right" if name == "tokens" else "left")
    for r in rows:
        if r["status"] == "ok":
            table.add_row(r["provider"], f"{r['max_tokens']:,}", "")
        else:
            table.add_row(r["provider"], "", f"{r['status']}: {r['reason']}")
    console.print(table)


def providers(everyone: list[Provider], device: torch.device) -> None:
    table = Table(title=f"Providers on {device.type}")
    for name in ("provider", "what it is", "here"):
        table.add_column(name)
    for p in everyone:
        table.add_row(p.name, p.summary, p.absent(device) or "[green]yes[/]")
    console.print(table)


def markdown(doc: dict[str, Any]) -> str:
    columns = peers(doc)
    lines = [
        "**The DPO loss step**: time as a multiple of the floor (the bare matrix products of the "
        "rows that carry loss), and peak memory beyond inputs and gradients. " + source(doc),
        "",
        line("scenario", "floor", *(f"`{c}`" for c in columns)),
        line("---", *["---:"] * (len(columns) + 1)),
    ]
    for name, rows in by_scenario(doc).items():
        floor = rows["products"]
        cells = [_loss_cell(rows.get(c)) for c in columns]
        seconds = floor["scenario"]["units"] * floor["t1_seconds"]
        lines.append(line(name, duration(seconds), *cells))
    lines += ["", *_remarks(doc)]
    return "\n".join(lines)


def _loss_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["status"] != "ok":
        return row["status"]
    text = f"{row['multiple_of_floor']:.2f}"
    return f"{text}, {amount(row['extra_bytes'])}" if "extra_bytes" in row else text


def _remarks(doc: dict[str, Any]) -> list[str]:
    """Where fastdpo loses, who is inaccurate, and who is absent."""
    lost, wrong, gone = [], [], {}
    for name, rows in by_scenario(doc).items():
        ours = rows.get("fastdpo")
        for r in rows.values():
            peer = f"`{r['provider']}`"
            if r["status"] == "inaccurate":
                wrong.append(f"{peer} on {name} ({r['reason'].split(';')[0]})")
            elif r["status"] in ("absent", "failed"):
                gone[peer] = r["reason"]
            elif r["provider"] != "products" and not r["provider"].startswith("fastdpo"):
                lost += _losses_to(r, ours, name)
    lines = []
    lines.append("Where fastdpo's default loses: " + ("; ".join(lost) or "nowhere here") + ".")
    if wrong:
        lines.append("Not as accurate as eager PyTorch, so not timed: " + "; ".join(wrong) + ".")
    if gone:
        listed = "; ".join(f"{peer} ({reason})" for peer, reason in gone.items())
        lines.append(f"Not here: {listed}.")
    return ["\n\n".join(lines)]


def _losses_to(peer: dict[str, Any], ours: dict[str, Any] | None, scenario: str) -> list[str]:
    if ours is None or ours["status"] != "ok" or peer["status"] != "ok":
        return []
    found = []
    mine, theirs = ours["seconds"]["median"], peer["seconds"]["median"]
    if theirs < mine:
        found.append(
            f"time against `{peer['provider']}` on {scenario} "
            f"({duration(mine)} against {duration(theirs)})"
        )
    if "extra_bytes" in ours and peer.get("extra_bytes", ours["extra_bytes"]) < ours["extra_bytes"]:
        found.append(
            f"memory against `{peer['provider']}` on {scenario} "
            f"({amount(ours['extra_bytes'])} against {amount(peer['extra_bytes'])})"
        )
    return found


def longest_pairs_markdown(doc: dict[str, Any]) -> str:
    first = doc["results"][0]
    lines = [
        f"**The longest pair that fits** {amount(first['limit_bytes'])}, "
        f"{first['scenario']['head']}, {first['scenario']['dtype']}. " + source(doc),
        "",
        line("provider", "tokens"),
        line("---", "---:"),
    ]
    lines += [
        line(f"`{r['provider']}`", f"{r['max_tokens']:,}")
        for r in doc["results"]
        if r["status"] == "ok"
    ]
    return "\n".join(lines)


def plot(doc: dict[str, Any], path: Path) -> None:
    """PATH: bars of the multiples of the floor; PATH-tokens: time and memory against tokens."""
    multiples(doc, path)
    against_tokens(doc, path.with_name(f"{path.stem}-tokens{path.suffix}"))


def multiples(doc: dict[str, Any], path: Path) -> None:
    """Bars of time over the floor, one panel per scenario; 1 is the bare products."""
    panels = timed(doc)
    if not panels:
        return
    most = max(len(rows) for rows in panels.values())
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.4 * columns, (0.9 + 0.24 * most) * lines), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        rows = sorted(rows, key=lambda r: -r["multiple_of_floor"])
        values = [r["multiple_of_floor"] for r in rows]
        bars = axis.barh(
            [r["provider"] for r in rows], values, color=[colour(r["provider"]) for r in rows]
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.axvline(1, color="black", lw=0.8)
        axis.set_xlim(0, max(values) * 1.15)
        axis.tick_params(labelsize=7)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("time / floor", fontsize=7)
    figure.suptitle(describe(doc["environment"]), fontsize=8)
    save(figure, path)


def against_tokens(doc: dict[str, Any], path: Path) -> None:
    """Time and extra memory against tokens, where scenarios differ in nothing else."""
    series: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for r in doc["results"]:
        if r["status"] == "ok" and "seconds" in r and r["provider"] != "products":
            s = r["scenario"]
            key = tuple(s[k] for k in ("head", "share", "trains", "dtype", "reference", "peaked"))
            series.setdefault(key, {}).setdefault(r["provider"], []).append(r)
    key, lines = max(
        series.items(), key=lambda item: max(len(v) for v in item[1].values()), default=((), {})
    )
    if max((len(v) for v in lines.values()), default=0) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    for name, rows in lines.items():
        rows = sorted(rows, key=lambda r: r["scenario"]["tokens"])
        x = [r["scenario"]["tokens"] for r in rows]
        style = {"color": OURS, "lw": 2.2} if name == "fastdpo" else {"lw": 1.0}
        axes[0].plot(x, [r["seconds"]["median"] for r in rows], "o-", ms=3, label=name, **style)
        with_memory = [r for r in rows if "extra_bytes" in r]
        axes[1].plot(
            [r["scenario"]["tokens"] for r in with_memory],
            [max(r["extra_bytes"], 1 << 20) / 2**30 for r in with_memory],
            "o-",
            ms=3,
            label=name,
            **style,
        )
    for axis, text in zip(axes, ("seconds per step", "extra memory, GiB"), strict=True):
        if any(len(line.get_xdata()) for line in axis.lines):  # a log axis needs a point
            axis.set(xscale="log", yscale="log")
            token_ticks(axis, {r["scenario"]["tokens"] for rows in lines.values() for r in rows})
        axis.set(xlabel="tokens", ylabel=text)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    head, share, trains, dtype, *_ = key
    figure.suptitle(
        f"{head}, {share:.0%} carry loss, {trains}, {dtype}\n{describe(doc['environment'])}",
        fontsize=8,
    )
    save(figure, path)


def timed(doc: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    panels: dict[str, list[dict[str, Any]]] = {}
    for r in doc["results"]:
        if r["status"] == "ok" and "multiple_of_floor" in r:
            panels.setdefault(r["scenario"]["name"], []).append(r)
    return panels
