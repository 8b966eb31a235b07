"""`compiled_triton.py`, for each architecture in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sampling import sampled

pytest.importorskip("triton")

TESTS = Path(__file__).parents[2]
# Another Triton may lie there (`.ci/run` does that with the oldest).
_PATH = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
_ALL = ("-m", "exhaustive or not exhaustive")
_PLUGINS = ("-p", "no:cacheprovider", "-p", "benchmarks.instruments.ptx.triton_plugin")


ARCHITECTURES = ("sm_80", "sm_90")
KERNELS = "instruments/ptx/compiled_triton.py"
# What a backend says of itself is not about kernels.
ELSEWHERE = "it_says_what_it_serves or a_triton_that_is_too_old"


def compiled(
    arch: str, path: str, *selection: str, part: str = "0/1"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            *_PLUGINS,
            *_ALL,
            *selection,
            str(TESTS / path),
        ],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "FASTDPO_TRITON_PTX": arch,
            "FASTDPO_TRITON_PTX_PART": part,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *_PATH]),
        },
        capture_output=True,
        text=True,
    )


@pytest.fixture(params=sampled(ARCHITECTURES, ("sm_90",)))
def passes(request):
    """Each architecture by itself: the workers of a parallel run share them."""

    def check(*test: str, part: str = "0/1") -> None:
        done = compiled(request.param, *test, part=part)
        assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
        assert " passed" in done.stdout

    return check


def test_the_compiled_kernels(passes):
    passes(KERNELS, "-m", "not slow")


@pytest.mark.exhaustive
def test_more_of_the_compiled_kernels(passes):
    passes(KERNELS, "-m", "slow")


# In parts, which the workers share.
@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["0/4", "1/4", "2/4", "3/4"])
def test_every_test_of_the_primitives(passes, part):
    passes("backends/test_triton_primitives.py", "-k", f"not ({ELSEWHERE})", part=part)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["0/2", "1/2"])
def test_ties(passes, part):
    passes("core/test_first_maximum.py", "-k", "triton and not processes", part=part)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["0/2", "1/2"])
def test_the_public_functions(passes, part):
    passes("backends/test_triton_public.py", part=part)
