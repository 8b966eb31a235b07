"""benchmarks/gpu.sh: what it calls, in which order, and what it does where time is short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels.comparison import Shape
from benchmarks.kernels.primitives import comparisons
from benchmarks.providers import registry

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path):
    done = gpu_script(str(tmp_path / "out"))
    assert done.returncode == 1
    assert "PyTorch sees no GPU here" in done.stdout


def test_the_gpu_script_stops_where_time_is_short(tmp_path):
    done = gpu_script("--cpu", str(tmp_path / "out"), "1")
    assert done.returncode == 0
    stages = "build smoke tests loss kernels tune rows compiled step accuracy max-tokens every-test"
    said = [line.split("] ")[1] for line in done.stdout.splitlines()]
    for name in (*stages.split(), "sanitizer"):
        assert any(line.startswith(f"{name}: skipped") for line in said), name
    # Parts of smoke by themselves: where they are named, or it has found something.
    assert not any(line.startswith(("times:", "ptxas:")) for line in said)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["log.txt"]
    for wrong in ([], ["out", "soon"], ["a", "1", "b"]):
        assert gpu_script(*wrong).returncode == 2


def test_the_gpu_script_runs_the_stages_that_are_named(tmp_path):
    done = gpu_script("--cpu", str(tmp_path / "out"), "1", "kernels", "loss")
    assert done.returncode == 0
    for name in ("kernels", "loss"):
        assert f"{name}: skipped" in done.stdout
    for name in ("build", "tests", "step", "max-tokens"):
        assert f"{name}: " not in done.stdout


def test_the_gpu_scripts_stages_share_the_time_of_those_that_are_not_named(tmp_path):
    done = gpu_script("--cpu", str(tmp_path / "out"), "600", "build")
    assert done.returncode == 0
    (seconds,) = re.findall(r"build: at most (\d+) s", done.stdout)
    assert 500 < int(seconds) <= 600  # what is left of them


# In the places of Python, of a driver's program and of nvcc's on a machine with a GPU.
_PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
  echo "yes 9.0 $EXTENSION yes yes trl"
  exit
fi
echo "${TRITON_PTXAS_PATH:+ptxas }${FASTDPO_AUTOTUNE:+tuned }$*" >>"$CALLS"
[ "$2" != benchmarks.smoke ] || exit "$SMOKE"
"""
_PROGRAM = """#!/usr/bin/env bash
if [ "${0##*/}" = ncu ]; then echo ncu >>"$CALLS"; fi
"""


def on_a_gpu(folder, *stages, smoke=0, extension="yes"):
    """What the script calls where there is a GPU, and what it says."""
    programs = {"fake-python": _PYTHON} | dict.fromkeys(("nvidia-smi", "ncu", "ptxas"), _PROGRAM)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    done = gpu_script(
        *(str(folder / "out"), "2000", *stages),
        PYTHON=str(folder / "fake-python"),
        PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
        CALLS=str(folder / "calls"),
        SMOKE=str(smoke),
        EXTENSION=extension,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "calls").read_text().splitlines(), done.stdout


def test_the_gpu_scripts_first_visit(tmp_path):
    calls, said = on_a_gpu(tmp_path, "build", "smoke", "ncu", "tests")
    smoke, ncu, tests = calls
    assert smoke.startswith("-m benchmarks.smoke ")
    assert smoke.endswith("--device cuda")
    assert ncu == "ncu"
    assert "-n 8 --dist worksteal --timeout 90" in tests
    files = [word for word in tests.split() if word.endswith(".py")]
    assert len(files) == 6
    assert all((ROOT / file).exists() for file in files)
    assert "fastdpo._cuda is here already" in said
    assert "absent from the results: trl" in said


def test_the_gpu_script_asks_the_other_ptxas_where_smoke_finds_anything(tmp_path):
    calls, said = on_a_gpu(tmp_path, "build", "smoke", smoke=1, extension="no")
    build, smoke, again = calls
    assert build == "setup.py build_ext --inplace"
    assert again.startswith("ptxas -m benchmarks.smoke ")
    assert again.endswith("--no-times")
    assert smoke.split()[2] != again.split()[3], "the first one's results are kept"
    assert "smoke: failed with status 1" in said


def test_all_of_the_gpu_script(tmp_path):
    known = {p.name for p in registry()}
    calls, _ = on_a_gpu(tmp_path)
    assert not any("--no-checks" in call or call.startswith("ptxas") for call in calls)
    assert "benchmarks.smoke" in calls[0]
    assert "gpu and slow" in calls[-1], "sanitizers last"
    losses = [call.split() for call in calls if "benchmarks.loss " in call]
    first, compiled = losses[:2]
    slow = {"compiled", "liger-1-compiled", "cce-compile"}
    assert not slow & set(first)
    assert slow <= set(compiled)
    for call in losses:
        asked = call[call.index("--providers") + 1 :]
        assert set(asked[: asked.index("--out")] if "--out" in asked else asked) <= known
    tuned = [call for call in calls if call.startswith("tuned ")]
    assert len(tuned) == 1
    primitives = [call.split("--primitives ")[1] for call in calls if "--primitives" in call]
    assert primitives[0] == primitives[1] == "exp_logits exp_logits with E"
    named = set(" ".join(primitives).split()) - {"with", "E"}
    assert named == {c.name for c in comparisons(Shape("tiny", 9), CPU)} - {"exp_logits with E"}


def gpu_script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
