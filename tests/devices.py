"""Where a backend's tests run: Triton's on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch


def device_of(backend: str) -> torch.device:
    """conftest.py gives what runs on a GPU its mark."""
    if backend != "triton":
        return torch.device("cpu")
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def of_processes(backend: str) -> None:
    """Processes of the tests exchange CPU tensors, which Triton only interprets."""
    if device_of(backend).type == "cuda":
        pytest.skip("interpreted on a machine without a GPU")
