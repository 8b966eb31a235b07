"""`import fastdpo`: what it offers, what it must not load, and the one place of its version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdpo
import fastdpo.data
import fastdpo.loss
import fastdpo.parallel

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "triton", "transformers", "trl", "peft", "datasets")


def loaded_after(code: str) -> list[str]:
    """Which of HEAVY a fresh interpreter has loaded once it has run `code`."""
    printed = f"{code}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    command = [sys.executable, "-c", printed]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_face_is_the_functions_themselves():
    functions = set(fastdpo.__all__) - {"VocabParallel", "SequenceParallel", "__version__"}
    for name in functions:
        assert getattr(fastdpo, name) is getattr(fastdpo.loss, name)
    assert functions == {n for n in fastdpo.loss.__all__ if not n.startswith("Linear")}
    assert fastdpo.VocabParallel is fastdpo.parallel.VocabParallel
    assert fastdpo.SequenceParallel is fastdpo.parallel.SequenceParallel
    assert set(fastdpo.__all__) <= set(dir(fastdpo))


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'linear_dpo'"):
        _ = fastdpo.linear_dpo
    assert not hasattr(fastdpo, "LinearLogps")  # of fastdpo.loss: results are not called


def test_import_fastdpo_loads_nothing_heavy():
    assert loaded_after("import fastdpo; fastdpo.__version__; dir(fastdpo)") == []


def test_the_functions_load_pytorch_alone():
    assert loaded_after("import fastdpo; fastdpo.linear_dpo_loss") == ["torch"]
    assert loaded_after("from fastdpo import *") == ["torch"]
    assert loaded_after("import fastdpo; fastdpo.loss.linear_logps") == ["torch"]
    assert loaded_after("import fastdpo; fastdpo.parallel.VocabParallel") == ["torch"]


def test_preparing_data_loads_no_library_that_it_is_not_given():
    assert set(loaded_after("import fastdpo.data.prepare")) <= {"torch"}
    listed = "import fastdpo.data; assert 'load_reference' in dir(fastdpo.data)"
    assert loaded_after(listed) == ["torch"]
    needed = set(loaded_after("from fastdpo.data import reference_logps"))
    assert needed <= {"torch", "triton"}  # of the losses


def test_what_is_not_in_data_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"fastdpo\.data' has no attribute 'reference_logp'"):
        _ = fastdpo.data.reference_logp


def test_one_place_states_the_version():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert not re.search(r"^version = \"", pyproject, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fastdpo.__version__}\n" in citation
    assert f"## {fastdpo.__version__}" in (ROOT / "CHANGELOG.md").read_text()
