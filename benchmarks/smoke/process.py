"""Processes of their own, which may hang, fail or be killed, and what became of them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

Row = dict[str, Any]
ASK = signal.SIGUSR1  # where are you? From the process itself: another thread could not look safely
_TO_ANSWER = 1.0  # seconds
GRACE = 10  # seconds after which a process that nobody has ended ends itself
_WORDS, _STDERR = 300, 6000  # characters that are kept


def said(error: BaseException) -> str:
    """An error in one line: a compiler's reason stands in the last one, CUDA's in the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    last = "" if len(lines) == 1 or lines[0].startswith("CUDA error") else f" … {lines[-1]}"
    return f"{type(error).__name__}: {lines[0][: _WORDS // 2]}{last}"[:_WORDS]


def failed(error: BaseException) -> Row:
    """While it is handled; where it was is told too."""
    where = traceback.format_exc()[-_STDERR:]
    return {"verdict": "FAILED", "words": said(error), "stderr": where}


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
            command,
            stdout=stdout,
            stderr=stderr,
            env=env,
            text=True,
            errors="replace",
            start_new_session=True,
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


def _wait(process: subprocess.Popen[str], seconds: float) -> int | None:
    """Its status; None where it still runs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def _paper() -> IO[str]:
    """What a process writes on: what it leaves running cannot keep it open, as it could a pipe."""
    return tempfile.TemporaryFile("w+", errors="replace")


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _lost(status: int, stderr: str) -> str:
    """Why a process ended without an answer."""
    lines = stderr.strip().splitlines()
    last = lines[-1][:_WORDS] if lines else "it said nothing"
    if status >= 0:
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
    begin = time.monotonic()
    until = ("--until", str(begin + limit))
    command = replace(command, arguments=(*command.arguments, *until))
    with _paper() as stdout, _paper() as stderr:
        with command.started(stdout, stderr) as process:
            status = _wait(process, limit)
            if status is None:
                process.send_signal(ASK)
                _wait(process, _TO_ANSWER)
        answers = [line for line in _read(stdout).splitlines() if line.startswith("{")]
        complaints = _read(stderr)
    row: Row
    if status is None:
        hung = limit >= usual
        words = f"killed after {limit:.0f} s{'' if hung else ', when no time was left'}"
        row = {"verdict": "HUNG" if hung else "skipped", "words": words}
    elif status == 0 and answers:
        row = json.loads(answers[-1])
    else:
        row = {"verdict": "FAILED", "words": _lost(status, complaints)}
    if row["verdict"] not in ("ok", "absent"):
        row["stderr"] = complaints[-_STDERR:] + row.get("stderr", "")
    return row | {"seconds": time.monotonic() - begin}


def streamed(command: Command, silence: float, end: float, show: Callable[[Row], None]) -> Row:
    """Rows as a process prints them, until it ends, is silent for too long, or time is over (at
    `end` of the monotonic clock). Returns what became of it.
    """
    rows: queue.Queue[str | None] = queue.Queue()

    def read(pipe: IO[str]) -> None:
        for line in pipe:
            rows.put(line)
        rows.put(None)

    with _paper() as stderr, command.started(subprocess.PIPE, stderr) as process:
        assert process.stdout is not None
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        while True:
            left = end - time.monotonic()
            try:
                line = rows.get(timeout=max(0.0, min(silence, left)))
            except queue.Empty:
                if left <= silence:
                    return {"verdict": "skipped", "words": "no time was left for more"}
                words = f"killed after {silence:.0f} s without a word"
                return {"verdict": "HUNG", "words": words, "stderr": _read(stderr)[-_STDERR:]}
            if line is None:
                break
            if line.startswith("{"):
                show(json.loads(line))
        status, complaints = process.wait(5), _read(stderr)
    if status == 0:
        return {"verdict": "ok", "words": ""}
    words = _lost(status, complaints)
    return {"verdict": "FAILED", "words": words, "stderr": complaints[-_STDERR:]}
