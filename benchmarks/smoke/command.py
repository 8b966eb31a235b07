"""python -m benchmarks.smoke: does each kernel compile and run, how wrong is it, how fast.

    python -m benchmarks.smoke OUT            within 150 s
    python -m benchmarks.smoke OUT 60 --no-times --check pytorch "exp_logits one row"
    python -m benchmarks.smoke OUT 300 --device cpu    by Triton's interpreter, at small sizes

First every check in a process of its own, several at a time on a GPU: a hang or an illegal access
costs one line. Then, in one process, times beside the vendor's products and copies. Each line is
printed as soon as it is known, and OUT/smoke.json then holds it too:

    ok       ran, and is as right as it should be
    WRONG    ran, and its numbers are wrong (or none at all)
    FAILED   raised, or its process was killed by a signal
    HUNG     was killed because it took too long
    absent   cannot run here, and why
    skipped  there was no time
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.environment import default_device
from benchmarks.smoke import table
from benchmarks.smoke.process import Command, Row, alone, streamed

_SECONDS, _LIMIT = 150.0, 60.0
_BAD = ("WRONG", "FAILED", "HUNG")
_AT_A_TIME = {"cuda": 12, "cpu": 1}  # most of their time is importing and compiling, on the host
_LEAST = 5.0  # seconds that are worth beginning something for


class Report:
    """The rows so far, on paper and on the screen."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "smoke.json"
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Written before it is shown: what is seen is kept."""
        self.rows.append(row)
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.rows, indent=1) + "\n")
        beside.replace(self._path)
        print(_line(row), flush=True)

    @property
    def bad(self) -> list[str]:
        return [r.get("check") or r["time"] for r in self.rows if r["verdict"] in _BAD]


def _line(row: Row) -> str:
    if "check" in row:
        seconds = f"{row['seconds']:5.1f} s" if "seconds" in row else " " * 7
        return f"{row['verdict']:7} {row['check']:40} {seconds}  {row['words']}"
    if row["verdict"] != "ok":
        return f"{row['verdict']:7} {row['time']:40} {row.get('words', '')}"
    parts = [f"{row['seconds']['median'] * 1e3:9.3f} ms"]
    for key, unit in (
        ("tera_operations_per_second", "TFLOP/s"),
        ("tera_bytes_per_second", "TB/s"),
    ):
        parts += [f"{row[key]:8.2f} {unit}"] if key in row else []
    if "multiple_of_floor" in row:
        parts.append(f"{row['multiple_of_floor']:6.3f} × {row['floor']}")
    if "mhz" in row:
        parts.append(f"{row['mhz']:.0f} MHz, {row['watts']:.0f} W")
    return f"time    {row['time']:44} {'  '.join(parts)}"


def checks(args: argparse.Namespace, report: Report, end: float) -> None:
    """A thread for each that runs, which waits for its process."""
    named = args.check or list(table.CHECKS)
    cores = os.cpu_count() or 1
    here = args.jobs or min(cores, _AT_A_TIME[args.device.type])
    threads = max(1, cores // here)

    def one(name: str) -> Row:
        usual = args.limit * table.CHECKS[name].patience
        limit = min(usual, end - time.monotonic())
        if limit < min(_LEAST, usual):
            return {"check": name, "verdict": "skipped", "words": "no time was left"}
        device = ("--device", str(args.device))
        arguments = (name, *device, "--checks-from", *args.checks_from)
        interpreted = args.device.type == "cpu"
        command = Command("benchmarks.smoke.one", arguments, interpreted, threads)
        return {"check": name, **alone(command, limit, usual)}

    with ThreadPoolExecutor(here) as pool:
        waiting = [pool.submit(one, name) for name in named]
        for done in as_completed(waiting):
            report.add(done.result())


def times(args: argparse.Namespace, report: Report, end: float) -> None:
    left = end - time.monotonic()
    ended: Row = {"verdict": "skipped", "words": "no time was left"}
    if left >= _LEAST:
        arguments = ("--device", str(args.device), "--seconds", str(left))
        threads = os.cpu_count() or 1
        command = Command("benchmarks.smoke.times", arguments, args.device.type == "cpu", threads)
        ended = streamed(command, args.limit, end, report.add)
    if ended["verdict"] != "ok":
        report.add({"time": "the times", **ended})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("out", type=Path, metavar="OUT", help="a folder, for smoke.json")
    made.add_argument("seconds", type=float, nargs="?", default=_SECONDS, metavar="SECONDS")
    made.add_argument("--device", type=torch.device, default=default_device())
    made.add_argument("--no-checks", action="store_true", help="times alone")
    made.add_argument("--no-times", action="store_true", help="checks alone")
    made.add_argument("--check", nargs="+", metavar="NAME", help="only these")
    made.add_argument("--limit", type=float, default=_LIMIT, help="seconds until a check hangs")
    made.add_argument("--jobs", type=int, help="checks at a time (default: 12 on a GPU, else 1)")
    made.add_argument(
        "--checks-from", nargs="+", default=[], metavar="MODULE", help="modules with further checks"
    )
    return made


def main() -> int:
    made = parser()
    args = made.parse_args()
    known = table.load(args.checks_from)
    unknown = sorted(set(args.check or ()) - set(known))
    if unknown:
        made.error(f"--check should be among {', '.join(known)}, got {', '.join(unknown)}")
    end = time.monotonic() + args.seconds
    report = Report(args.out)
    if not args.no_checks:
        checks(args, report, end)
        print(f"{len(report.rows)} checks, of which not right: {report.bad or 'none'}", flush=True)
    if not args.no_times:
        times(args, report, end)
    left = max(0.0, end - time.monotonic())
    print(f"done with {left:.0f} s left; not right: {report.bad or 'none'}", flush=True)
    return int(bool(report.bad))
