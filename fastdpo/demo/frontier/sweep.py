"""Runs a plan into a folder: one JSON per run, written whole or not at all, so that a sweep that
was killed goes on where it was.

    settings.json    the sizes; a folder of other sizes is refused
    runs/NAME.json   one for each finished run
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from . import exact, methods
from .lab import Lab
from .plan import OBJECTIVE_BETAS, Run, check_plan
from .settings import Settings

# Of the records; a folder written by a version that means something else by them is refused.
FORMAT = 1

FUNCTIONS: dict[str, Callable[[Lab, Run], dict[str, Any]]] = {
    "truth": exact.exact,
    "dpo": methods.dpo,
    "ppo_learned": methods.ppo_learned,
    "ppo_true": methods.ppo_true,
    "rloo": methods.rloo,
    "unlikelihood": methods.unlikelihood,
    "preferred_ft": methods.preferred_ft,
    **dict.fromkeys(OBJECTIVE_BETAS, methods.other_objective),
    "flipped": methods.flipped,
    "cycle": methods.cycle,
    "reference": methods.reference,
    "length": methods.length,
    "strategy": methods.strategy,
    "control": methods.control,
    "weighted": methods.weighted,
    "modpo": methods.modpo,
}

Progress = Callable[[int, int, str], None]  # finished, in all, the latest run's name


def sweep(
    folder: Path,
    settings: Settings,
    plan: Sequence[Run],
    *,
    jobs: int = 1,
    progress: Progress | None = None,
) -> int:
    """Runs what the folder lacks; returns how many runs that were.

    Args:
        folder: made if need be; what it has of the plan is kept.
        jobs: processes, of one thread each.
        progress: told after every run.

    Raises:
        ValueError: the plan or jobs cannot be used, or the folder holds something else or a sweep
            of other settings; before anything runs or is written.
    """
    check(folder, settings, plan, jobs)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", _header(settings))
    todo = [run for run in plan if not path_of(folder, run).exists()]
    if progress is not None:
        progress(len(plan) - len(todo), len(plan), "")
    if jobs > 1 and len(todo) > 1:
        _with_processes(folder, plan, todo, jobs, progress)
    else:
        _in_this_process(folder, settings, plan, todo, progress)
    return len(todo)


def check(folder: Path, settings: Settings, plan: Sequence[Run], jobs: int) -> None:
    """What `sweep` refuses.

    Raises:
        ValueError: naming the argument.
    """
    check_plan(plan)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs should be an integer of at least 1, got {jobs!r}")
    check_folder(folder, settings)


def check_folder(folder: Path, settings: Settings) -> None:
    """
    Raises:
        ValueError: naming what differs.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"folder should be a directory, got the file {folder}")
    file = folder / "settings.json"
    if not file.is_file():
        if any(folder.iterdir()):
            raise ValueError(f"folder should be empty or hold a sweep, got {folder}")
        return
    found, wanted = json.loads(file.read_text()), _header(settings)
    if found.get("format") != wanted["format"]:
        raise ValueError(
            f"folder should hold a sweep of format {FORMAT}, got {found.get('format')} in {folder}"
        )
    there = found["settings"]
    differing = [
        f"{name} {there.get(name)} (asked for: {value})"
        for name, value in wanted["settings"].items()
        if there.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"folder should hold a sweep of the same settings, got {folder} with "
            f"{', '.join(differing)}"
        )


def path_of(folder: Path, run: Run) -> Path:
    return folder / "runs" / f"{run.name}.json"


def run_one(lab: Lab, run: Run) -> dict[str, Any]:
    """The record of one run: what it is, and what its method found out."""
    return {
        "method": run.method,
        "knobs": dict(run.knobs),
        "seed": run.seed,
        **FUNCTIONS[run.method](lab, run),
    }


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: to a file beside it, which then takes its place."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(rounded(value), file, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def rounded(value: Any) -> Any:
    """Floats to six significant digits: a sweep's JSON stays small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value


def _header(settings: Settings) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": settings.as_dict(),
        "fastdpo": __version__,
        "torch": torch.__version__,
    }


def _in_this_process(
    folder: Path,
    settings: Settings,
    plan: Sequence[Run],
    todo: Sequence[Run],
    progress: Progress | None,
) -> None:
    lab, parent = Lab(settings), os.getppid()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower with more
    try:
        for run in todo:
            if os.getppid() != parent:  # whoever began the sweep is gone
                raise SystemExit(1)
            if not path_of(folder, run).exists():
                write_json(path_of(folder, run), run_one(lab, run))
            if progress is not None:
                progress(_finished(folder, plan), len(plan), run.name)
    finally:
        torch.set_num_threads(threads)


def _with_processes(
    folder: Path,
    plan: Sequence[Run],
    todo: Sequence[Run],
    jobs: int,
    progress: Progress | None,
) -> None:
    """Each process has every jobs-th run; this one counts files."""
    shares = [json.dumps([_as_json(run) for run in todo[k::jobs]]) for k in range(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastdpo.demo.frontier.worker", str(folder.absolute())]
    workers = []
    try:
        for share in shares:
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
            workers.append(worker)
            assert worker.stdin is not None
            worker.stdin.write(share.encode())
            worker.stdin.close()
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.5)
            if progress is not None:
                progress(_finished(folder, plan), len(plan), "")
            if any(worker.poll() not in (None, 0) for worker in workers):
                raise RuntimeError("a process of the sweep failed, its message is above")
        if any(worker.returncode for worker in workers):
            raise RuntimeError("a process of the sweep failed, its message is above")
        if progress is not None:
            progress(_finished(folder, plan), len(plan), "")
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
            worker.wait()


def _finished(folder: Path, plan: Sequence[Run]) -> int:
    return sum(path_of(folder, run).exists() for run in plan)


def _as_json(run: Run) -> dict[str, Any]:
    return {"method": run.method, "knobs": list(run.knobs), "seed": run.seed}


def work(folder: Path, share: Sequence[dict[str, Any]]) -> None:
    """One process's share of a sweep whose folder exists."""
    settings = Settings(**json.loads((folder / "settings.json").read_text())["settings"])
    runs = [
        Run(entry["method"], tuple((name, value) for name, value in entry["knobs"]), entry["seed"])
        for entry in share
    ]
    _in_this_process(folder, settings, runs, runs, None)
