"""The Triton kernels as Triton compiles them, behind the Triton backend.

`installed(arch)` has every launch compiled ahead of time for the architecture and its PTX executed
on the CPU tensors it was given. Needs a process in which Triton does not interpret.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.instruments.ahead_of_time import compile_for
from benchmarks.instruments.ptx import instructions  # noqa: F401
from benchmarks.instruments.ptx.hopper import Descriptor
from benchmarks.instruments.ptx.machine import PARAMETERS, Machine
from benchmarks.instruments.ptx.memory import Global
from benchmarks.instruments.ptx.parse import Kernel, parse
from benchmarks.instruments.ptx.regions import Rows, allocations
from benchmarks.instruments.ptx.schedule import Scheduled
from fastdpo.backends import triton as triton_backend
from fastdpo.backends.triton import ops
from fastdpo.backends.triton.launch import Launch, Target

# What a call's first launch that names it writes: nothing there may be read before.
_WRITTEN = {
    "partial_ptr", "sums_ptr", "reanchored_ptr", "new_anchor_ptr", "logit_ptr", "logps_ptr",
    "lse_ptr", "loss_ptr", "rewards_ptr", "coefficients_ptr", "own_ptr", "settled_ptr",
}  # fmt: skip
_INPUTS = {"sequence_loss_kernel": {"logps_ptr"}, "logits_logps_backward_kernel": {"lse_ptr"}}
_SCALARS = {"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}
_SCALARS |= {"i1": ctypes.c_bool, "fp64": ctypes.c_double, "u1": ctypes.c_bool}
_SWIZZLE = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes, by what Triton calls it


class Executor(Scheduled):
    def __init__(self, arch: str, processors: int) -> None:
        self.target = Target(arch, processors)
        self.machines: dict[str, Machine] = {}
        self.launched: list[str] = []
        self.alterations: dict[str, Callable[[Kernel], Kernel]] = {}

    def run(self, launches: Iterable[Launch], device: torch.device) -> None:
        written: dict[int, np.ndarray] = {}
        for launch in launches:
            self.execute(launch, written)

    def execute(self, launch: Launch, written: dict[int, np.ndarray]) -> None:
        """`written` says what earlier launches have written of the memory between them."""
        compiled = compile_for(self.target.arch, launch)
        if compiled.hash not in self.machines:
            kernel = parse_one(compiled.asm["ptx"])
            threads = kernel.threads or 32 * compiled.metadata.num_warps
            shared = compiled.metadata.shared
            self.machines[compiled.hash] = Machine(kernel, threads, shared_bytes=shared)
        machine = self.machines[compiled.hash]
        if alter := self.alterations.get(machine.kernel.name):
            shared = compiled.metadata.shared
            machine = Machine(alter(machine.kernel), machine.threads, shared_bytes=shared)
        signature = compiled.src.signature
        kernel = machine.kernel
        parameters, descriptors = _pack(kernel, signature, launch, compiled.metadata)
        memory = Global(_allocations(kernel.name, signature, launch, written))
        self.launched.append(kernel.name)
        machine.launch(memory, parameters, launch.grid, seed=self.seed, descriptors=descriptors)


def parse_one(ptx: str) -> Kernel:
    (kernel,) = parse(ptx).values()
    return kernel


def _pack(kernel: Kernel, signature: dict[str, str], launch: Launch, metadata):
    """(the parameters' bytes, descriptors by address); scratch pointers at the end are null."""
    variables = list(kernel.parameters.values())
    data = np.zeros(max(v.offset + v.size for v in variables), np.uint8)
    descriptors: dict[int, Descriptor] = {}
    described = iter(getattr(metadata, "tensordesc_meta", None) or [])
    place = iter(variables)

    def put(value: object, kind: type | None = None) -> None:
        variable = next(place)
        if kind is None:
            kind = ctypes.c_uint32 if variable.size == 4 else ctypes.c_uint64
        raw = np.frombuffer(bytes(kind(value)), np.uint8)
        if raw.size != variable.size:
            raise ValueError(f"a parameter of {variable.size} bytes, a value of {raw.size}")
        data[variable.offset :][: variable.size] = raw

    for name, kind in signature.items():
        value = launch.arguments.get(name)
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            put(value.data_ptr())
        elif kind.startswith("tensordesc"):
            variable = next(place)
            meta = next(described)
            descriptors[PARAMETERS + variable.offset] = Descriptor(
                value.base.data_ptr(), tuple(value.shape), tuple(value.strides),
                tuple(meta["block_size"]), value.base.element_size(), _SWIZZLE[meta["swizzle"]],
            )  # fmt: skip
            for number in (*value.shape, *value.strides):
                put(number)
        else:
            put(value, _SCALARS[kind])
    rest = list(place)
    if any(variable.size != 8 for variable in rest) or len(rest) > 2:
        raise ValueError(f"{kernel.name} has {len(rest)} parameters that nobody gave")
    return data, descriptors


def _allocations(name: str, signature: dict[str, str], launch: Launch, written: dict):
    found = []
    # With fewer elements than threads several threads load each, and one of them stores it; in
    # place, the others may find the gradient there, which they do not use.
    several = name == "logits_logps_backward_kernel" and launch.arguments["BLOCK_V"] < 128
    for argument, kind in signature.items():
        value = launch.arguments.get(argument)
        if kind.startswith("tensordesc"):
            found.append(_rows_of(argument, value.base, False))
        elif kind.startswith("*") and value.numel():
            fresh = argument in _WRITTEN - _INPUTS.get(name, set())
            fresh &= value.data_ptr() not in written
            if argument == "reanchored_ptr":  # with fixed anchors the caller gives it
                fresh &= not launch.arguments.get("AGAIN", True)
            found.append(_rows_of(argument, value, fresh)._replace(watched=not several))
    result = allocations(found)
    for allocation in result:
        known = written.get(allocation.address)
        if known is not None and known.size == allocation.data.size:
            allocation.written = known
        elif allocation.written is not None:
            written[allocation.address] = allocation.written
    return result


def _rows_of(name: str, tensor: Tensor, unwritten: bool) -> Rows:
    """A matrix row by row; a kernel has no business between them."""
    count, stride = (tensor.shape[0], tensor.stride(0)) if tensor.dim() == 2 else (1, 0)
    if tensor.dim() == 0:
        length = 1
    else:
        length = (tensor.shape[-1] - 1) * tensor.stride(-1) + 1
    return Rows(name, tensor.data_ptr(), count, length, stride, tensor.element_size(), unwritten)


@contextlib.contextmanager
def installed(executor: Executor) -> Iterator[ModuleType]:
    """`fastdpo.backends.triton` over CPU tensors."""
    with (
        mock.patch.object(ops, "run", executor.run),
        mock.patch.object(ops, "target_of", side_effect=lambda like: executor.target),
    ):
        yield triton_backend
