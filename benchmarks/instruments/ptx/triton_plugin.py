"""A pytest plugin: tests of the Triton backend run what Triton compiles for an architecture.

    TRITON_INTERPRET=0 FASTDPO_TRITON_PTX=sm_80 PYTHONPATH=.:tests \\
        pytest -p benchmarks.instruments.ptx.triton_plugin tests/backends/test_triton_primitives.py
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

PROCESSORS = 3  # so that loops over tiles have something to skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FASTDPO_TRITON_PTX_PART=1/3: every third test, from the second on."""
    if part := os.environ.get("FASTDPO_TRITON_PTX_PART"):
        first, parts = map(int, part.split("/"))
        items[:] = items[first::parts]


@pytest.fixture(scope="session")
def executor():
    from benchmarks.instruments.ptx.triton_kernels import Executor

    return Executor(os.environ["FASTDPO_TRITON_PTX"], PROCESSORS)


@pytest.fixture(autouse=True)
def _executed(executor, monkeypatch):
    import fastdpo.backends.triton as backend
    from benchmarks.instruments.ptx.triton_kernels import installed

    # The CPU's tensors are served, as they are when Triton interprets.
    monkeypatch.setattr(backend, "interpreted", lambda: True)

    if (primitives := sys.modules.get("test_triton_primitives")) is not None:
        # The interpreter cuts bf16 off, instructions round.
        monkeypatch.setitem(primitives.ROUNDING, torch.bfloat16, (2.0**-8, 1e-37))
    with installed(executor):
        yield
