"""Shared settings of the tests: the Triton kernels run through the interpreter where there is no
GPU.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Before anything imports triton; tests of the real compiler start processes of their own
    # without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
import pytest
from processes import Processes

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.patch_once_a_launch()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

_INTERPRET = os.environ.get("TRITON_INTERPRET")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != _INTERPRET:
            # The tests of a GPU would interpret their kernels, and prove nothing.
            raise pytest.UsageError("TRITON_INTERPRET should be left alone by what tests import")
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            if parameters.get("backend") == "triton":
                item.add_marker("gpu")  # `devices.device_of`
        return
    skip = pytest.mark.skip(reason="needs a GPU: `pytest -m gpu` on a machine that has one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _precisions():
    """`torch.backends`' own setting first: a library that says "none" inherits it."""
    backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return {backend: backend.fp32_precision for backend in backends}


PRECISIONS = _precisions()


@pytest.fixture(autouse=True)
def _precision_of_products():
    """Trainers switch TF32 on, for the whole process: not for the tests that come after."""
    yield
    if _precisions() != PRECISIONS:
        for backend, precision in PRECISIONS.items():
            backend.fp32_precision = precision


@pytest.fixture(autouse=True)
def _no_autocast_is_left_on():
    """A mode that a test leaves on is found where it was left, not in the tests that come after."""
    yield
    left = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in left:
        torch.set_autocast_enabled(kind, False)
    assert not left, f"autocast was left on for {left}"


def _pool(size, tmp_path_factory):
    pool = Processes(size, str(tmp_path_factory.mktemp("store") / "file"))
    yield pool
    pool.close()


# Started once a module: what one test breaks, those of another do not see.
@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    yield from _pool(2, tmp_path_factory)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    yield from _pool(3, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    yield from _pool(4, tmp_path_factory)
