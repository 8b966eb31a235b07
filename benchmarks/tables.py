"""What the terminal shows: a progress line while measuring, then tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.scenarios import Scenario

console = Console()
_MARKS = {"absent": "–", "refused": "–", "failed": "failed", "inaccurate": "inaccurate"}


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
