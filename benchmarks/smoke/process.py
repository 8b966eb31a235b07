"""Processes of their own, which may hang, fail or be killed, and what became of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

Row = dict[str, Any]
GRACE = 10  # seconds after which a process that nobody has ended ends itself
_WORDS, _STDERR = 300, 6000  # characters that are kept


def said(error: BaseException) -> str:
    """An error in one line: a compiler's reason stands in the last one, CUDA's in the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    last = "" if len(lines) == 1 or lines[0].startswith("CUDA error") else f" … {lines[-1]}"
    return f"{type(error).__name__}: {lines[0][: _WORDS // 2]}{last}"[:_WORDS]


@dataclass(frozen=True)
class Command:
    """A module of this package to run."""

    module: str
    arguments: tuple[str, ...]
    interpreted: bool  # by Triton, for checks without a GPU
    threads: int

    @contextmanager
    def started(self, stdout: int | IO[str], stderr: IO[str]) -> Iterator[subprocess.Popen[str]]:
        """With a session of its own, so that what it has started ends with it."""
        env = dict(os.environ)
        env.setdefault("OMP_NUM_THREADS", str(self.threads))
        if self.interpreted:
            env.setdefault("TRITON_INTERPRET", "1")
        command = [sys.executable, "-m", self.module, *self.arguments]
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=env, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:  # a driver holds it, and will not let go for us
        return


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _lost(status: int | None, stderr: str) -> str:
    """Why a process ended without an answer."""
    lines = stderr.strip().splitlines()
    last = lines[-1][:_WORDS] if lines else "it said nothing"
    if status is None or status >= 0:
        return f"status {status}: {last}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    return f"killed by {name}: {last}"


def alone(command: Command, limit: float, usual: float) -> Row:
    """One check. Killed after `limit` seconds: it hung, unless it was given less than the `usual`.

    The row has a verdict and words, and where it failed what it wrote to stderr.
    """
    begin, status = time.monotonic(), None
    until = ("--until", str(begin + limit))
    command = replace(command, arguments=(*command.arguments, *until))
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with command.started(stdout, stderr) as process:
            try:
                status = process.wait(limit)
                killed = False
            except subprocess.TimeoutExpired:
                killed = True
        answers = _read(stdout).strip().splitlines()
        complaints = _read(stderr)
    seconds = time.monotonic() - begin
    row: Row = {"verdict": "FAILED", "words": _lost(status, complaints)}
    if killed:
        hung = limit >= usual
        what = "HUNG" if hung else "skipped"
        row = {"verdict": what, "words": f"killed after {limit:.0f} s" + ", no time" * (not hung)}
    elif status == 0 and answers:
        row = json.loads(answers[-1])
    if row["verdict"] not in ("ok", "absent"):
        row["stderr"] = complaints[-_STDERR:]
    return row | {"seconds": seconds}


def streamed(
    command: Command, silence: float, end: float, show: Callable[[Row], None]
) -> tuple[str, str]:
    """Rows as a process prints them, until it ends, is silent for too long, or time is over (at
    `end` of the monotonic clock). Returns its verdict and words.
    """
    rows: queue.Queue[str | None] = queue.Queue()

    def read(pipe: IO[str]) -> None:
        for line in pipe:
            rows.put(line)
        rows.put(None)

    with (
        tempfile.TemporaryFile("w+") as stderr,
        command.started(subprocess.PIPE, stderr) as process,
    ):
        assert process.stdout is not None
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        while True:
            left = end - time.monotonic()
            try:
                line = rows.get(timeout=max(0.0, min(silence, left)))
            except queue.Empty:
                if left <= silence:
                    return "skipped", "no time was left for more"
                return "HUNG", f"killed after {silence:.0f} s without a word"
            if line is None:
                break
            if line.startswith("{"):
                show(json.loads(line))
        status = process.wait(5)
        return ("ok", "") if status == 0 else ("FAILED", _lost(status, _read(stderr)))
