"""What every kind shows in the terminal: a progress line, the hardware, amounts that read well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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


def hardware(env: dict[str, Any], line: str) -> None:
    versions = ", ".join(f"{k} {v}" for k, v in env["packages"].items() if v)
    commit = (env["commit"]["id"] or "unknown")[:10]
    modified = " with uncommitted changes" if env["commit"]["modified"] else ""
    console.print(f"[bold]{line}[/]\n{versions}\ncommit {commit}{modified}")
    if env["device"] == "cpu":
        console.print("[yellow]These are CPU figures: they say nothing about a GPU.[/]")
