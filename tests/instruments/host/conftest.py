"""The host build of csrc/ behind the CUDA backend, for the tests of this folder.

FASTDPO_HOST_PTX=80 runs what nvcc compiles for that architecture instead (tests/instruments/ptx).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils import deterministic

from benchmarks.instruments.host import backend, build


@pytest.fixture(scope="session")
def host() -> backend.Host:
    why = build.missing()
    if why is not None:
        pytest.skip(f"the host build of csrc/ needs g++ and pybind11: {why}")
    compiled = build.build(sanitize=os.environ.get(backend.SANITIZE_VARIABLE) == "1")
    host = backend.Host(compiled)
    if arch := os.environ.get("FASTDPO_HOST_PTX"):
        from benchmarks.instruments.ptx.cuda_kernels import Executed

        return Executed(host, int(arch))
    return host


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def cuda(host):
    """fastdpo.backends.cuda, serving CPU tensors."""
    with backend.installed(host) as module:
        yield module
