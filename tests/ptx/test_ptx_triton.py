"""`compiled_triton.py`, for each architecture in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent.parent
_PLUGINS = ("-p", "no:cacheprovider", "-p", "ptx.triton_plugin")


def compiled(arch: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *_PLUGINS, *map(str, arguments)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "FASTDPO_TRITON_PTX": arch,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_compiled_kernels(arch):
    compiled(arch, "-m", "not slow", TESTS / "ptx" / "compiled_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_more_of_the_compiled_kernels(arch):
    compiled(arch, "-m", "slow", TESTS / "ptx" / "compiled_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_test_of_the_primitives(arch):
    # What a backend says of itself is not about kernels.
    elsewhere = "it_says_what_it_serves or a_triton_that_is_too_old"
    compiled(arch, "-k", f"not ({elsewhere})", TESTS / "test_triton_primitives.py")
