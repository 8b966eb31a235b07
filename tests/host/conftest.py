"""The host build of csrc/ behind the CUDA backend, for the tests of this folder."""

from __future__ import annotations

import os

import pytest
from host import backend, build


@pytest.fixture(scope="session")
def host() -> backend.Host:
    why = build.missing()
    if why is not None:
        pytest.skip(f"the host build of csrc/ needs g++ and pybind11: {why}")
    return backend.Host(build.build(sanitize=os.environ.get(backend.SANITIZE_VARIABLE) == "1"))


@pytest.fixture
def cuda(host):
    """fastdpo.backends.cuda, serving CPU tensors."""
    with backend.installed(host) as module:
        yield module
