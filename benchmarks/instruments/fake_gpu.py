"""A GPU that is not there: tensors that say they lie on one, and compute on the CPU, or not at all.

Enough of one to show, without a GPU, what the code does on it: which path it takes (products of
16-bit operands with fp32 results exist on CUDA devices only), what it waits for, what it
allocates, and that it never mixes devices. The Triton kernels run through the interpreter.

    with FakeGPU() as gpu:
        x = gpu.put(torch.randn(8, 16))     # x.is_cuda
        ...
        gpu.waits                           # operations that make the host wait for the device
        gpu.peak_bytes                      # what the device's allocator would have had to give

With `data=False` floating-point tensors hold no data, and may have a real model's size: what is
allocated can be counted in seconds. Integers and masks keep theirs, so that labels still select;
Triton kernels are then not run, and a number that the host reads from no data is 0. PyTorch's own
operators that are written in Python (linear_cross_entropy's) are run operation by operation, so
that what they allocate inside counts.

Not shown: what a kernel computes on a GPU, streams, and memory inside an operator.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)

# Results whose size depends on values, and values read on the host.
_WAITING = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the GPU; `inner` does not."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # what autograd's C++ sees: it would ask a CUDA device for its stream
        )
        outer.inner = inner
        return outer

    @property
    def device(self):
        return DEVICE

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    def __repr__(self):
        return f"OnDevice({self.inner!r})"

    def tolist(self):
        return self.cpu().tolist()  # PyTorch refuses it for subclasses

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside `with FakeGPU()`")


class FakeGPU(TorchDispatchMode):
    def __init__(self, data: bool = True):
        super().__init__()
        self.waits: list[str] = []
        self.peak_bytes = 0
        self._data = data
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self):
        with ExitStack() as stack:
            # Factories look for a driver first, and torch.tensor would go past this mode.
            stack.enter_context(mock.patch("torch.cuda._lazy_init"))
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
            if not self._data:
                kernel = "triton.runtime.interpreter.InterpretedFunction.run"
                stack.enter_context(mock.patch(kernel))
            self._undo = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._undo.close()

    def put(self, value: Tensor) -> Tensor:
        """A copy of a CPU tensor on the GPU: a leaf that requires a gradient where it does."""
        copy = value.detach().clone(memory_format=torch.preserve_format)
        return self._wrap(copy).requires_grad_(value.requires_grad)

    @staticmethod
    def get(value: Tensor) -> Tensor:
        """What a tensor on the GPU holds; no wait is counted."""
        found = value.detach()
        assert isinstance(found, OnDevice), f"{value} is not on the GPU"
        return found.inner

    def bytes(self) -> int:
        """Allocated now."""
        self._storages = {
            key: (reference, size)
            for key, (reference, size) in self._storages.items()
            if not reference.expired()
        }
        return sum(size for _, size in self._storages.values())

    def reset_peak(self) -> int:
        self.peak_bytes = self.bytes()
        return self.peak_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        there = any(isinstance(t, OnDevice) for t in tensors)
        asked = kwargs.get("device")
        to_device = there if asked is None else torch.device(asked).type != "cpu"
        if not there and not to_device:
            return func(*args, **kwargs)

        _check_devices(func, tensors)
        if func.namespace == "torch_nn":
            return self._inside(func, args, kwargs)
        if _waits(func, args, kwargs, to_device):
            self.waits.append(str(func))
        result = self._compute(func, args, kwargs, to_device)
        if not to_device:
            return result
        result = tree_map(lambda x: self._wrap(x) if isinstance(x, Tensor) else x, result)
        if func.namespace == "aten" and there:
            result = return_and_correct_aliasing(func, args, kwargs, result)
        return result

    def _inside(self, func, args, kwargs) -> Any:
        """An operator's Python, under this mode as its caller was."""
        definition = OPDEFS[func.name()]
        TorchDispatchMode.__enter__(self)
        try:
            return definition._init_fn(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def _compute(self, func, args, kwargs, to_device: bool) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
        if "device" in kwargs:
            holds = self._data or not to_device or not _floating(func, args, kwargs)
            kwargs["device"] = "cpu" if holds else "meta"
        if not self._data:
            if func is aten._local_scalar_dense.default and args[0].is_meta:
                return 0
            args, kwargs = _without_data(func, args, kwargs)
        return _PRODUCTS.get(func, func)(*args, **kwargs)

    def _wrap(self, inner: Tensor) -> Tensor:
        storage = inner.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.bytes())
        return OnDevice(inner)


def _check_devices(func, tensors: list[Tensor]) -> None:
    """On a real one, too, only numbers may come from the CPU."""
    if func in (aten.copy_.default, aten._to_copy.default):
        return
    strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    if strangers:
        raise RuntimeError(f"{func} mixes devices: {strangers}")


def _waits(func, args, kwargs, to_device: bool) -> bool:
    if func in _WAITING:
        return True
    if func is aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is aten._to_copy.default:
        return isinstance(args[0], OnDevice) != to_device
    if func is aten.copy_.default:
        return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
    return False


def _floating(func, args, kwargs) -> bool:
    """Whether what a factory makes is floating point."""
    dtype = kwargs.get("dtype")
    if dtype is None:
        like = next((a for a in args if isinstance(a, Tensor)), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
    return dtype.is_floating_point


def _without_data(func, args, kwargs):
    """Beside a tensor without data the others lose theirs; masks become positions first."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    if not any(t.is_meta for t in tensors):
        return args, kwargs
    if func is aten.index.Tensor:
        positions: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool and not index.is_meta:
                positions += index.nonzero(as_tuple=True)
            else:
                positions.append(index)
        args = (args[0], positions, *args[2:])
    return tree_map(
        lambda x: x.to("meta") if isinstance(x, Tensor) and x.dim() else x, (args, kwargs)
    )


def _wide_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What cuBLAS gives for 16-bit operands and fp32 results, which no CPU product does."""
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    assert a.dtype in (torch.float16, torch.bfloat16), a.dtype
    assert out_dtype == torch.float32, out_dtype
    return a.float() @ b.float()


def _wide_mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(_wide_mm(a, b, out_dtype))


def _wide_addmm_out(
    added: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    assert added.dtype == out.dtype == out_dtype, (added.dtype, out.dtype, out_dtype)
    found = alpha * _wide_mm(a, b, out_dtype)
    return out.copy_(found if beta == 0 else found + beta * added)


_PRODUCTS = {
    aten.mm.dtype: _wide_mm,
    aten.mm.dtype_out: _wide_mm_out,
    aten.addmm.dtype_out: _wide_addmm_out,
}
