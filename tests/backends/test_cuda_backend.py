"""The CUDA C++ backend where it cannot run: it imports, says why not, and traces without data."""

from __future__ import annotations

import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.backends import cuda, cuda_ops
from fastdpo.backends.contract import Head

PRIMITIVES = {"target_logits", "logits_logps", "logits_logps_backward", "sequence_loss"}


def test_it_names_its_primitives():
    assert cuda.PRIMITIVES == PRIMITIVES
    assert not hasattr(cuda, "exp_logits")
    for name in PRIMITIVES:
        assert callable(getattr(cuda, name))


def extension(**changed):
    """The few attributes of fastdpo._cuda that `available` reads."""

    def check_architecture(major, minor):
        raise ValueError("device: not built for it")

    attributes = {
        "CUDART_VERSION": 13000,
        "SASS_ARCHITECTURES": (90,),
        "driver_version": lambda: 13010,
        "check_architecture": check_architecture,
        **changed,
    }
    return lambda: types.SimpleNamespace(**attributes)


def availability(built, cuda_is_available=True):
    with (
        mock.patch.object(cuda, "extension", built),
        mock.patch.object(torch.version, "hip", None),
        mock.patch.object(torch.cuda, "is_available", return_value=cuda_is_available),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        return cuda.available()


def not_built():
    raise ModuleNotFoundError("No module named 'fastdpo._cuda'")


def test_available_says_what_is_missing():
    ok, why = availability(not_built)
    assert not ok
    assert "No module named 'fastdpo._cuda'" in why
    assert "FASTDPO_BUILD_CUDA=1" in why
    ok, why = availability(extension(), cuda_is_available=False)
    assert (ok, why) == (False, "no CUDA device: torch.cuda.is_available() is False")
    ok, why = availability(extension(driver_version=lambda: 12040))
    assert not ok
    assert why == "the driver serves CUDA 12.4, and fastdpo._cuda was built with CUDA 13"
    assert availability(extension()) == (False, "device: not built for it")
    ok, why = availability(extension(check_architecture=lambda major, minor: None))
    assert (ok, why) == (True, "CUDA C++ for 9.0")


def test_rocm_is_not_cuda():
    with (
        mock.patch.object(cuda, "extension", extension()),
        mock.patch.object(torch.version, "hip", "6.4"),
    ):
        assert cuda.available() == (False, "this PyTorch is built for ROCm, not for CUDA")


def test_supports_names_the_device_or_the_dtype():
    gpu = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert cuda.supports(gpu, dtype)[0]
    assert "float64" in cuda.supports(gpu, torch.float64)[1]
    assert "cpu" in cuda.supports(torch.device("cpu"), torch.float32)[1]


def test_importing_needs_neither_the_extension_nor_a_gpu():
    code = (
        "import sys; sys.modules['fastdpo._cuda'] = None;"
        "from fastdpo.backends import cuda; ok, why = cuda.available(); assert not ok; print(why)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout


def test_every_op_has_shapes_without_data():
    with FakeTensorMode():
        device = torch.device("cuda")
        logits = torch.empty(6, 50, dtype=torch.bfloat16, device=device)
        labels = torch.empty(6, dtype=torch.int64, device=device)
        h = Head(torch.empty(50, 8, dtype=torch.bfloat16, device=device), softcap=3.0)
        hidden = torch.empty(6, 8, dtype=torch.bfloat16, device=device)
        offsets = torch.empty(5, dtype=torch.int64, device=device)
        ref = torch.empty(4, device=device)

        a = cuda.target_logits(hidden, h, labels)
        logps, lse = cuda.logits_logps(logits, labels, h)
        cuda.logits_logps_backward(logps, logits, labels, lse, h, logits)
        loss = cuda.sequence_loss(logps, offsets, ref, 0.1, 0.0, True, "interleaved")
        fused = cuda.logits_sequence_loss(logits, labels, h, offsets, ref, 0.1)
    for tensor in (a, logps, fused.logps, fused.row_coefficients):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((6,), torch.float32, "cuda")
    for tensor in (lse, fused.lse):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((6, 2), torch.float32, "cuda")
    for result in (loss, fused.loss):
        assert [tuple(t.shape) for t in result] == [(), (4,), (4,), (4,)]


@pytest.mark.parametrize("name", sorted(cuda_ops._KERNELS))
def test_every_kernel_is_registered_for_cuda(name):
    dispatches = torch._C._dispatch_has_kernel_for_dispatch_key
    assert dispatches(f"fastdpo_cuda::{name}", "CUDA")
    assert dispatches(f"fastdpo_cuda::{name}", "Meta")
