"""What the terminal shows: a progress line while measuring, then tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.providers import Provider
from benchmarks.scenarios import Scenario

console = Console()
if not console.is_terminal:
    console = Console(width=160)  # a file or a pipe: wide enough for every column


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A progress line; the function it yields names what runs now, and counts it."""
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", title=title, total=total)
        yield lambda text: bar.update(task, description=text, advance=1)


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def amount(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}" if unit == "GiB" else f"{count / size:.0f} {unit}"
    return f"{count / 1024:.0f} KiB"


def spread(quantiles: dict[str, float]) -> str:
    return f"{duration(quantiles['p20'])} – {duration(quantiles['p80'])}"


def workspace(
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
        console.print(f"  {p['promise']} [{colour}]{p['measured']:.3f} {sign} {p['limit']}[/]")


def hardware(env: dict[str, Any], line: str) -> None:
    versions = ", ".join(f"{k} {v}" for k, v in env["packages"].items() if v)
    commit = (env["commit"]["id"] or "unknown")[:10]
    modified = " with uncommitted changes" if env["commit"]["modified"] else ""
    console.print(f"[bold]{line}[/]\n{versions}\ncommit {commit}{modified}")
    if env["device"] == "cpu":
        console.print("[yellow]These are CPU figures: they say nothing about a GPU.[/]")


def loss(scenario: Scenario, rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"{scenario.name} · N {scenario.carrying:,}, V {scenario.shape.vocab_size:,}, "
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


def counted(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["provider"] for r in rows))
    table = Table(title="Memory of a step, counted on tensors without data: nothing was measured")
    table.add_column("scenario")
    for name in names:
        table.add_column(name, justify="right")
    for scenario in dict.fromkeys(r["scenario"]["name"] for r in rows):
        mine = {r["provider"]: r for r in rows if r["scenario"]["name"] == scenario}
        table.add_row(
            scenario,
            *(
                amount(mine[n]["extra_bytes"]) if mine[n]["status"] == "ok" else mine[n]["status"]
                for n in names
            ),
        )
    console.print(table)
    reasons = {r["provider"]: r["reason"] for r in rows if r["status"] not in ("ok", "refused")}
    for name, reason in reasons.items():
        console.print(f"  {name}: {reason}")


def longest_pairs(rows: list[dict[str, Any]], limit: int, hardware_line: str) -> None:
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


def accuracy(scenario: Scenario, rows: list[dict[str, Any]]) -> None:
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


def step(rows: list[dict[str, Any]], how: dict[str, Any]) -> None:
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
