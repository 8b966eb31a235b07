"""Serves the CUDA C++ backend from the CPU: `installed()` puts the host build behind its ops."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from benchmarks.instruments.host import build
from fastdpo.backends import cuda, cuda_ops

SANITIZE_VARIABLE = "FASTDPO_HOST_SANITIZE"  # 1: the module with the sanitizers in it


class Host:
    """The compiled module and the strings that steer its executor."""

    def __init__(self, path: Path) -> None:
        self.module: ModuleType = build.load(path)
        self.steer = ctypes.CDLL(str(path))
        self.steer.host_cuda_half_to_float.restype = ctypes.c_float
        self.steer.host_cuda_float_to_half.argtypes = [ctypes.c_float]
        self.steer.host_cuda_float_to_bfloat16.argtypes = [ctypes.c_float]
        self.steer.host_cuda_blocks.restype = ctypes.c_ulonglong

    @contextlib.contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        """Blocks and threads in an order shuffled by the seed (0: in order)."""
        self.steer.host_cuda_seed(seed)
        try:
            yield
        finally:
            self.steer.host_cuda_seed(0)

    def fail_next_launch(self, error: int) -> None:
        self.steer.host_cuda_fail_next_launch(error)

    def blocks(self) -> int:
        """How many blocks have run so far."""
        return self.steer.host_cuda_blocks()


@contextlib.contextmanager
def installed(host: Host) -> Iterator[ModuleType]:
    """`fastdpo.backends.cuda` over CPU tensors: the same code but for device and stream."""
    library = torch.library.Library("fastdpo_cuda", "IMPL")
    for name, kernel in cuda_ops._KERNELS.items():
        library.impl(name, kernel, "CPU")
    queue = contextlib.nullcontext({"device": 0, "stream": 0})
    try:
        with (
            mock.patch.object(cuda_ops, "_DEVICE_TYPE", "cpu"),
            mock.patch.object(cuda_ops, "extension", return_value=host.module),
            mock.patch.object(cuda_ops, "_on", return_value=queue),
        ):
            yield cuda
    finally:
        library._destroy()
