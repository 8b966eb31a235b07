"""`fastdpo demo --frontier`: the sweep with a progress bar, its figures, and a table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import figures
from .plan import Run, full_plan, quick_plan
from .results import Results, load, merge
from .settings import Settings
from .summary import COLUMNS, rows
from .sweep import check, sweep

SEEDS = {"quick": 2, "full": 3}
# Of COLUMNS, what a terminal has room for.
SHORT = ("method", "KL", "reward", "at most", "answers drawn", "CPU s")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo demo --frontier",
        description="The DPO paper's claims where the truth is known: reward against KL, and win "
        "rates against temperature, with DPO, PPO and others in a world of 262,144 answers. The "
        "quick version takes a few minutes on two CPU cores; a run that was interrupted goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--frontier", action="store_true", required=True, help=argparse.SUPPRESS)
    add("--output", type=Path, default=Path("fastdpo-frontier"), help="the directory to write")
    add("--full", action="store_true", help="every study, three seeds: under an hour")
    add("--seeds", type=int, help="seeds of every run (2, or 3 with --full)")
    add("--jobs", type=int, default=2, help="processes, of one thread each")
    return parser


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Raises:
        ValueError: an option cannot be used, or the folder holds something else. Nothing has run
            or been written then.
    """

    folder: Path
    settings: Settings
    plan: tuple[Run, ...]
    jobs: int

    def __post_init__(self) -> None:
        check(self.folder, self.settings, self.plan, self.jobs)


def read(arguments: Sequence[str]) -> Asked:
    options = parser().parse_args(arguments)
    seeds = options.seeds
    if seeds is None:
        seeds = SEEDS["full" if options.full else "quick"]
    plan = full_plan(seeds) if options.full else quick_plan(seeds)
    return Asked(options.output, Settings(), tuple(plan), options.jobs)


def run(asked: Asked, console: Console | None = None) -> Results:
    """The sweep, then everything that is made of its records."""
    console = Console() if console is None else console
    folder, plan = asked.folder, asked.plan
    start = time.perf_counter()
    with Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as bars:
        bar = bars.add_task("Runs", total=len(plan), note="")

        def progress(finished: int, total: int, name: str) -> None:
            bars.update(bar, completed=finished, total=total, note=name)

        ran = sweep(folder, asked.settings, plan, jobs=asked.jobs, progress=progress)
    results = load(folder)
    merge(results, folder / "results.json")
    drawn = figures.draw(results, folder / "figures")
    console.print(table(results))
    console.print(
        f"{ran} runs in {time.perf_counter() - start:.0f} s, {len(plan) - ran} were there already. "
        f"In [bold]{folder}[/bold]: results.json, figures/ ({', '.join(drawn)})."
    )
    return results


def table(results: Results) -> Table:
    title = "Reward and KL, exact, beside the most reward that this KL can buy"
    table = Table(title=title, title_justify="left")
    for name in SHORT:
        first = name == SHORT[0]
        table.add_column(name, justify="left" if first else "right", no_wrap=first)
    for row in rows(results):
        cells = dict(zip(COLUMNS, row, strict=True))
        cells["reward"] = cells["reward"].split()[0]
        table.add_row(*(cells[name] for name in SHORT))
    return table
