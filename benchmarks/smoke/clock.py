"""The processors' clock and the power while something runs, as nvidia-smi tells them."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from typing import Any

_EVERY = 50  # ms
_FIELDS = "clocks.sm,power.draw.instant"


class Clock:
    """Reads from its beginning to the end of the process; nothing, where there is no nvidia-smi."""

    def __init__(self, on_gpu: bool) -> None:
        self._seen: list[tuple[float, float, float]] = []  # when, MHz, W
        if not on_gpu or shutil.which("nvidia-smi") is None:
            return
        options = (f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits", "-i", "0")
        self._process = subprocess.Popen(
            ["nvidia-smi", *options, "-lms", str(_EVERY)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.take(line, time.monotonic())

    def take(self, line: str, now: float) -> None:
        """A line of nvidia-smi's; one that holds no numbers says nothing."""
        try:
            megahertz, watts = map(float, line.split(","))
        except ValueError:
            return
        self._seen.append((now, megahertz, watts))

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """The median clock and the largest power of the time between two moments."""
        seen = [(hertz, watts) for when, hertz, watts in self._seen if begin <= when <= end]
        if not seen:
            return {}
        clocks, power = zip(*seen, strict=True)
        return {"mhz": statistics.median(clocks), "watts": max(power)}

    def close(self) -> None:
        if hasattr(self, "_process"):
            self._process.kill()
