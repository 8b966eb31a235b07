"""The CUDA C++ kernels as nvcc compiles them, behind the CUDA backend.

The launchers and bindings are those of the host build; each of its launches is diverted to the
executor, parameters and all, with the PTX of the kernel of the same mangled name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.instruments.host import backend, build
from benchmarks.instruments.ptx import instructions  # noqa: F401
from benchmarks.instruments.ptx.machine import Machine
from benchmarks.instruments.ptx.memory import Global
from benchmarks.instruments.ptx.parse import Kernel, parse
from benchmarks.instruments.ptx.regions import Rows, allocations
from benchmarks.instruments.ptx.schedule import Scheduled

CSRC = build.ROOT / "csrc"
_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-ptx"]  # as setup.py has them
_TYPES = {"13__nv_bfloat16": 2, "6__half": 2, "f": 4}


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("FASTDPO_NVCC"), "nvcc", *(f"{home}/bin/nvcc" for home in homes)]
    found = map(shutil.which, filter(None, candidates))
    return next(filter(None, found), None)


def compiled(arch: int) -> dict[str, Kernel]:
    """Every kernel of csrc by its mangled name; built once per state of the sources."""
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(" ".join([version.stdout, *_FLAGS]).encode())
    for path in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cuh"), *CSRC.glob("*.h")]):
        digest.update(path.read_bytes())
    folder = build.ROOT / "build" / "ptx" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    kernels: dict[str, Kernel] = {}
    for source in sorted(CSRC.glob("*.cu")):
        target = folder / f"{source.stem}.{arch}.ptx"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            command = [nvcc, *_FLAGS, f"-arch=compute_{arch}", str(source), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.replace(target)
        kernels |= parse(target.read_text())
    return kernels


# ---- The parameters: csrc/params.h

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class _LogitMap(ctypes.Structure):
    _fields_ = [(name, _FLOAT) for name in ("pre", "post", "gain")]


def _structure(pointers: str, *others: tuple[str, Any]) -> type[ctypes.Structure]:
    fields = [*((name, _POINTER) for name in pointers.split()), *others]
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


_TAIL = (("vocab", _INT), ("splits", _INT), ("map", _LogitMap))
_FORWARD = _structure(
    "logits labels logps lse counters partials", ("rows", _LONG), ("row_stride", _LONG), *_TAIL
)
_BACKWARD = _structure(
    "logits out labels lse grad grad_scale",
    *((f"{name}_stride", _LONG) for name in ("row", "out", "grad")),
    *_TAIL,
)
_TARGET = _structure(
    "hidden weight bias labels out",
    *((name, _LONG) for name in ("hidden_stride", "weight_stride", "rows", "vocab")),
    ("width", _INT), ("bias_dtype", _INT), ("map", _LogitMap),
)  # fmt: skip
_LOSS = _structure(
    "logps labels offsets ref_logps loss sequence_logps rewards coefficients "
    "row_coefficients counter pair_losses",
    ("rows", _LONG), ("pairs", _LONG), ("beta", ctypes.c_double),
    ("label_smoothing", ctypes.c_double), ("average", ctypes.c_bool),
    ("interleaved", ctypes.c_bool),
)  # fmt: skip


def _vector(name: str, address: int, length: int, element: int = 4, **options: bool) -> Rows:
    return Rows(name, address, 1, length, length, element, **options)


def _own(name: str, address: int, length: int, element: int = 4) -> Rows:
    """What blocks hand to each other."""
    return _vector(name, address, length, element, unwritten=True, watched=False)


def _of_forward(p: Any, blocks: int, types: list[int]) -> list[Rows]:
    assert blocks == p.rows * p.splits
    found = [Rows("logits", p.logits, p.rows, p.vocab, p.row_stride, types[0])]
    found += [_vector("labels", p.labels, p.rows, 8)]
    found += [_vector("logps", p.logps, p.rows, unwritten=True)]
    found += [_vector("lse", p.lse, 2 * p.rows, unwritten=True)]
    if p.splits > 1:
        found.append(_own("partials", p.partials, p.rows * p.splits, 8))
        if p.counters:
            found.append(_vector("counters", p.counters, p.rows, watched=False))
    return found


def _of_combine(p: Any, _blocks: int, types: list[int]) -> list[Rows]:
    found = [Rows("logits", p.logits, p.rows, p.vocab, p.row_stride, types[0])]
    found += [_vector("labels", p.labels, p.rows, 8), _vector("logps", p.logps, p.rows)]
    found += [_vector("lse", p.lse, 2 * p.rows)]
    return [*found, _vector("partials", p.partials, p.rows * p.splits, 8)]


def _of_backward(p: Any, blocks: int, types: list[int]) -> list[Rows]:
    rows = blocks // p.splits
    found = [Rows("logits", p.logits, rows, p.vocab, p.row_stride, types[0])]
    found += [Rows("out", p.out, rows, p.vocab, p.out_stride, types[1])]
    found += [_vector("labels", p.labels, rows, 8), _vector("lse", p.lse, 2 * rows)]
    found += [Rows("grad", p.grad, rows if p.grad_stride else 1, 1, p.grad_stride, 4)]
    return found + ([_vector("grad_scale", p.grad_scale, 1)] if p.grad_scale else [])


def _of_target(p: Any, _blocks: int, types: list[int]) -> list[Rows]:
    found = [Rows("hidden", p.hidden, p.rows, p.width, p.hidden_stride, types[0])]
    found += [Rows("weight", p.weight, p.vocab, p.width, p.weight_stride, types[0])]
    found += [_vector("labels", p.labels, p.rows, 8), _vector("out", p.out, p.rows, unwritten=True)]
    size = 2 if p.bias_dtype else 4
    return found + ([_vector("bias", p.bias, p.vocab, size)] if p.bias else [])


def _of_loss(p: Any, _blocks: int, _types: list[int]) -> list[Rows]:
    both = 2 * p.pairs
    found = [_vector("logps", p.logps, p.rows), _vector("offsets", p.offsets, both + 1, 8)]
    found += [_vector("labels", p.labels, p.rows, 8), _vector("ref_logps", p.ref_logps, both)]
    outputs = [("loss", 1), ("sequence_logps", both), ("rewards", both), ("coefficients", both)]
    outputs += [("row_coefficients", p.rows)]
    found += [_vector(name, getattr(p, name), n, unwritten=True) for name, n in outputs]
    found += [_vector("counter", p.counter, 1, watched=False)]
    found += [_own("pair_losses", p.pair_losses, p.pairs, 8)]
    return [rows for rows in found if rows.address and rows.length]


_KERNELS = {
    "logits_logps": (_FORWARD, _of_forward), "logits_logps_backward": (_BACKWARD, _of_backward),
    "logits_logps_combine": (_FORWARD, _of_combine),
    "target_logits": (_TARGET, _of_target), "sequence_loss": (_LOSS, _of_loss),
}  # fmt: skip


# ---- The backend

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
)


class Executed(Scheduled):
    """Stands where tests of the host build have a `backend.Host`."""

    def __init__(self, host: backend.Host, arch: int) -> None:
        self.host, self.kernels = host, compiled(arch)
        self.machines: dict[tuple[str, int], Machine] = {}
        self._count = 0
        self._failure: Exception | None = None
        self._callback = _CALLBACK(self._launch)

    def blocks(self) -> int:
        return self._count

    @property
    def module(self) -> Any:
        return _Diverted(self)

    def _launch(self, name: bytes, blocks: int, threads: int, params: int, size: int) -> int:
        try:
            self._run(name.decode(), blocks, threads, ctypes.string_at(params, size))
        except Exception as error:
            self._failure = error
            return 1
        return 0

    def _run(self, name: str, blocks: int, threads: int, params: bytes) -> None:
        kernel = self.kernels[name]
        (variable,) = kernel.parameters.values()
        assert variable.size == len(params), "the two compilers lay the parameters out alike"
        op = re.search(r"fastdpo\d+(\w+?)_kernel", name)[1]
        structure, describe = _KERNELS[op]
        assert ctypes.sizeof(structure) == len(params)
        memory = Global(
            allocations(describe(structure.from_buffer_copy(params), blocks, _types(name)))
        )
        data = np.frombuffer(params, np.uint8)
        if (name, threads) not in self.machines:
            self.machines[name, threads] = Machine(kernel, threads)
        self.machines[name, threads].launch(memory, data, (blocks,), seed=self.seed)
        self._count += blocks


def _types(name: str) -> list[int]:
    """The sizes of a kernel's template arguments; S1_ is the first one again."""
    found = re.search(r"_kernelI(.*?)Lb", name)
    words = re.findall(r"13__nv_bfloat16|6__half|f|S1_", found[1]) if found else []
    return [_TYPES[words[0] if word == "S1_" else word] for word in words]


class _Diverted:
    """The compiled module while its launches go to the executor."""

    def __init__(self, executed: Executed) -> None:
        self._executed = executed

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._executed.host.module, name)
        return functools.partial(self._call, value) if callable(value) else value

    def _call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        executed = self._executed
        executed.host.steer.host_cuda_divert(executed._callback)
        try:
            return function(*arguments, **named)
        except RuntimeError:
            failure, executed._failure = executed._failure, None
            if failure is not None:
                raise failure from None
            raise
        finally:
            executed.host.steer.host_cuda_divert(None)


def installed(executed: Executed) -> contextlib.AbstractContextManager[ModuleType]:
    return backend.installed(executed)
