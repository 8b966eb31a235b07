"""This folder's tests once more, with AddressSanitizer and UndefinedBehaviorSanitizer in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.instruments.host import backend, build

HERE = Path(__file__).parent


@pytest.mark.exhaustive
@pytest.mark.skipif(
    os.environ.get(backend.SANITIZE_VARIABLE) == "1", reason="this is the sanitized run"
)
def test_everything_under_the_sanitizers():
    why = build.sanitizer_missing()
    if why is not None:
        pytest.skip(f"the sanitized host build of csrc/ is impossible here: {why}")
    # Once for the compiler, outside of the sanitizers' own process.
    build.build(sanitize=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE],
        env={**os.environ, **build.sanitizer_environment(), backend.SANITIZE_VARIABLE: "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
    assert " passed" in done.stdout
