"""A run that is killed at any moment is finished by the same call, as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("datasets", reason="needs datasets")

import datasets
from hf_models import build
from test_reference import pairs

from fastdpo.data import PairCollator, load_reference, reference_logps
from fastdpo.data import reference as module
from fastdpo.data.reference_folder import Folder

if os.name != "posix":
    pytest.skip("needs SIGKILL and fork", allow_module_level=True)

TESTS = Path(__file__).parents[1]
COUNT, BUDGET = 40, 90

PREPARED = f"""
import os, signal, sys, time
sys.path[:0] = {[str(TESTS), str(TESTS / "data"), str(TESTS.parent)]}
import torch
torch.set_num_threads(1)
import datasets, pyarrow
from datasets import Dataset
from test_reference_killed import computed, made
from fastdpo.data import reference, reference_folder
out = sys.argv[1]
"""

# Says how far it is, and is slow: to be killed from outside.
SLOW = """
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.05)
computed(out, progress)
"""

# One process after the other kills itself: in the middle of the first file that it writes, after
# it, in the middle of the second, and so on to after the fourth, and again, until one has finished.
AT_EVERY_FILE = """
real = reference_folder._write

def killed_after(written):
    def write(file):
        file.write(written)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return write

def attempt(moment):
    count = 0

    def write(path, write):
        nonlocal count
        count += 1
        real(path, killed_after(b"half") if count * 2 - 1 == moment else write)
        if count * 2 == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    reference_folder._write = write
    computed(out, False, model)

model = made()
computed(out + "-before", False, model)  # what is asked of a model once
killed = 0
while True:
    child = os.fork()
    if child == 0:
        attempt(1 + killed % 8)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    killed += 1
print(killed)
"""


def made():
    return build("Llama").bfloat16()


def computed(out, progress, model=None):
    """A part for every batch."""
    model = made() if model is None else model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAVE_SECONDS", -1.0)
        patch.setattr("fastdpo.data.reference_folder.ROWS_PER_FILE", 15)
        patch.setattr(module, "load_reference", lambda out: None)
        reference_logps(
            model,
            pairs(COUNT),
            PairCollator(0, "packed"),
            out,
            max_tokens_per_batch=BUDGET,
            progress=progress,
        )


def started(code, out):
    command = [sys.executable, "-c", PREPARED + code, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def contents(folder):
    """Every file, to the byte, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "r"
    computed(out, False)
    found = contents(out)
    assert len(found) == 5  # three files of rows
    return found


def test_killed_in_the_middle(tmp_path, whole, monkeypatch):
    out = tmp_path / "r"
    process = started(SLOW, out)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= COUNT // 3:
            break
    with pytest.raises(ValueError, match="is being written by another process"):
        computed(out, False)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = Folder(out).done()
    assert 0 < done < len(Folder(out).batches())
    calls = []
    computed(out, lambda known, total: calls.append(known))
    assert calls[0] == sum(len(batch) for batch in Folder(out).batches()[:done])
    assert len(calls) == 1 + len(Folder(out).batches()) - done  # no batch was computed again
    assert contents(out) == whole
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = load_reference(out)
    assert [row["chosen_ids"] for row in rows] == [pair["chosen_ids"] for pair in pairs(COUNT)]


def test_killed_at_every_file(tmp_path, whole):
    process = started(AT_EVERY_FILE, tmp_path / "r")
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert int(printed) >= 16  # at each moment twice
    assert contents(tmp_path / "r") == whole
