"""`fastdpo bench`: the benchmarks are part of the repository, not of the installed package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fastdpo

MODULE = "benchmarks.loss"


def bench(arguments: Sequence[str]) -> int:
    """Runs `python -m benchmarks.loss` in the checkout, and returns its exit status."""
    root = find()
    if root is None:
        print(
            "fastdpo: error: the benchmarks are in the repository (benchmarks/loss): clone it and "
            f"run `python -m {MODULE}` or `fastdpo bench` there",
            file=sys.stderr,
        )
        return 2
    command = [sys.executable, "-m", MODULE, *arguments]
    return subprocess.run(command, cwd=root, check=False).returncode


def find() -> Path | None:
    """The checkout: where the package was imported from, else the working directory."""
    for root in (Path(fastdpo.__file__).resolve().parents[1], Path.cwd()):
        folder = root / "benchmarks"
        if (folder / "loss.py").is_file() or (folder / "loss" / "__main__.py").is_file():
            return root
    return None
