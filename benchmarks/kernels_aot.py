"""A launch of the Triton backend compiled ahead of time for a GPU that need not be there.

Everything Triton specializes on (types, divisibility by 16, ones, constants) is read off the
launch's own arguments, which may be tensors on the meta device. Of the binary are kept registers,
spills, shared memory, and how often the instructions occur that a kernel claims to use. Needs a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo.backends.triton.launch import Launch

# Bytes of shared memory a block may have (AMD: LDS of a workgroup).
SHARED_LIMITS = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
# Tensor-core products by the names they have in machine code: warps (HMMA), warp groups (HGMMA),
# the fifth generation's own memory (UTCHMMA), AMD's matrix cores; and the tensor memory
# accelerator's loads and stores.
_PRODUCTS = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|v_mfma_\w+|QMMA|OMMA)\b")
_TMA_LOADS, _TMA_STORES = re.compile(r"\bUTMALDG\b"), re.compile(r"\bUTMASTG\b")
_LOCAL = re.compile(r"\b(?:STL|LDL)\b")


@dataclass(frozen=True)
class Resources:
    """What compiling gave."""

    registers: int
    spilled: int  # bytes of stack, or registers on AMD
    local_instructions: int  # STL and LDL
    shared: int  # bytes
    shared_limit: int
    products: dict[str, int]
    tma_loads: int
    tma_stores: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compiled(launch: Launch, arch: str) -> Resources:
    """Compiles `launch` for "sm_90", "gfx942", ...; triton's own exceptions where it cannot."""
    source = _source(launch)
    binary = triton.compile(source, target=_target(arch), options=launch.options)
    shared, limit = binary.metadata.shared, SHARED_LIMITS[arch]
    if arch.startswith("gfx"):
        return _amd(binary.asm["amdgcn"], shared, limit)
    return _nvidia(binary.asm["cubin"], shared, limit)


def _target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def _source(launch: Launch) -> ASTSource:
    kernel, arguments = launch.kernel, dict(launch.arguments)
    while hasattr(kernel, "values"):  # triton.heuristics
        for name, value in kernel.values.items():
            arguments[name] = value(arguments)
        kernel = kernel.fn
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind = _type_of(value)
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or kind is None or one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = kind
        if _divisible(value) and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _type_of(value: Any) -> str | None:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{canonicalize_dtype(value.base.dtype)}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{canonicalize_dtype(value.dtype)}"
    if isinstance(value, float):
        return "fp32"
    if type(value) is int:
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return None


def _divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return type(value) is int and value % 16 == 0


def _nvidia(cubin: bytes, shared: int, limit: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = _run(tool, "--dump-resource-usage", str(path))
        sass = _run(tool, "-sass", str(path))
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Resources(
        registers=registers,
        spilled=local + stack,
        local_instructions=len(_LOCAL.findall(sass)),
        shared=shared,
        shared_limit=limit,
        products=_counted(_PRODUCTS.findall(sass)),
        tma_loads=len(_TMA_LOADS.findall(sass)),
        tma_stores=len(_TMA_STORES.findall(sass)),
    )


def _amd(assembly: str, shared: int, limit: int) -> Resources:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return Resources(
        registers=field("vgpr_count"),
        spilled=field("vgpr_spill_count") + field("private_segment_fixed_size"),
        local_instructions=len(re.findall(r"\bscratch_(?:load|store)", assembly)),
        shared=shared,
        shared_limit=limit,
        products=_counted(_PRODUCTS.findall(assembly)),
        tma_loads=0,
        tma_stores=0,
    )


def _counted(found: list[str]) -> dict[str, int]:
    return {name: found.count(name) for name in sorted(set(found))}


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
