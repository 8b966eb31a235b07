"""Ahead-of-time compilation for GPUs that are not there, and what the binaries say of themselves.

The launches are the ones that a call would make, on meta tensors: signatures, specializations and
options are Triton's own, so that what is looked at here is what would run. Needs no GPU, but a
process in which Triton does not interpret.

`python -m benchmarks.instruments.ahead_of_time` prints JSON, one object per kernel; tests and
`python -m benchmarks.kernels --static` read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from fastdpo.backends.contract import Head, SequenceLoss
from fastdpo.backends.triton import row_launches
from fastdpo.backends.triton.configs import CONFIGS
from fastdpo.backends.triton.exp_logits import STATS, Asked, prepare, tile_for
from fastdpo.backends.triton.launch import Launch, Target, interpreted

ARCHITECTURES = tuple(arch for arch in CONFIGS if arch != "interpreter")
# How each architecture's matrix instructions begin, in SASS or in AMD's assembly.
TENSOR_CORE: dict[str, str | tuple[str, ...]] = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": ("UTCHMMA", "HMMA"),  # the latter in the plain tile
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
_FLAGS = ("few", "out", "softcap", "bias", "ragged", "unaligned")
# What TRL's metrics ask of the kernel: without a softcap Σ z is a product of its own.
TRL_STATS = ("entropy", "is_top1")
TRL_STATS_CAPPED = ("entropy", "mean_logits", "is_top1")
_ROWS, _VOCABULARY, _DEPTH = 4096, 128256, 4096


@dataclass(frozen=True)
class Variant:
    """One way to call exp_logits."""

    kind: str = "half"  # or "tf32", "ieee": `configs.CONFIGS`
    few: bool = False  # rows
    out: bool = False  # is E stored?
    softcap: bool = False
    bias: bool = False
    stats: tuple[str, ...] = ()
    ragged: bool = False  # a vocabulary that is no multiple of the tile
    unaligned: bool = False  # rows of hidden and weight that descriptors cannot address

    def __str__(self) -> str:
        flags = [name for name in _FLAGS if getattr(self, name)]
        return "+".join([self.kind, *flags, *self.stats])


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    arch: str
    kernel: str
    variant: str
    tile: str
    group: int  # row tiles that share a strip of the weight, or 0
    warps: int
    stages: int
    registers: int
    spills: int  # loads and stores of spilled registers in the code
    shared: int  # bytes
    tensor_cores: int  # matrix instructions in the code, and so on
    bulk_loads: int
    bulk_stores: int
    exponentials: int
    instructions: int
    layout: str  # of what is summed over columns, among registers, lanes and warps
    column_tiles: int  # whose sums reduce_sums adds, or 0
    again: bool  # only does something where rows are flagged


def exp_logits_launches(arch: str, variant: Variant) -> list[Launch]:
    """What such a call launches: the product, reductions, and the two passes over flagged rows."""
    dtype = torch.bfloat16 if variant.kind == "half" else torch.float32
    rows = 64 if variant.few else _ROWS
    vocabulary = _VOCABULARY + 40 * variant.ragged
    depth = _DEPTH + 2 * variant.unaligned
    hidden = _meta(rows, depth, dtype=dtype)
    bias = _meta(vocabulary, dtype=dtype) if variant.bias else None
    head = Head(
        _meta(vocabulary, depth, dtype=dtype), bias, softcap=30.0 if variant.softcap else None
    )
    # E's rows are padded, as the schedule's are.
    out = (
        _meta(rows, -(-vocabulary // 64) * 64, dtype=dtype)[:, :vocabulary] if variant.out else None
    )
    with _matmul_precision(variant.kind):
        target = Target(arch, 132)
        asked = Asked(
            hidden, head, _meta(rows, dtype=torch.int64), _meta(rows), out=out, stats=variant.stats,
            label_logits=_meta(rows) if "mean_logits" in variant.stats else None,
            tolerance=_meta(rows) if "is_top1" in variant.stats else None,
        )  # fmt: skip
        return prepare(asked, target, tile_for(target, hidden, head)).launches


def row_kernel_launches(dtype: torch.dtype, softcap: bool) -> list[Launch]:
    """The primitives of one kernel each, for materialized logits of this dtype."""
    hidden, weight = _meta(_ROWS, _DEPTH, dtype=dtype), _meta(_VOCABULARY, _DEPTH, dtype=dtype)
    head = Head(weight, softcap=30.0 if softcap else None)
    labels, numbers = _meta(_ROWS, dtype=torch.int64), _meta(_ROWS)
    logits = _meta(_ROWS, _VOCABULARY, dtype=dtype)
    pairs, offsets = _meta(64), _meta(65, dtype=torch.int64)
    return [
        row_launches.target_logits(hidden, head, labels, numbers),
        row_launches.logits_logps(logits, labels, head.logit_map, numbers, numbers),
        row_launches.logits_logps_backward(
            numbers, logits, labels, numbers, head.logit_map, logits
        ),
        row_launches.sequence_loss(
            numbers,
            offsets,
            pairs,
            0.1,
            0.0,
            False,
            False,
            SequenceLoss(_meta(1), pairs, pairs, pairs),
        ),
    ]


def compile_for(arch: str, launch: Launch) -> CompiledKernel:
    with _compiling_for(arch):
        return launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)


def describe(arch: str, launch: Launch, compiled: CompiledKernel, variant: str) -> Resources:
    """Reads the binary."""
    read = _amd_binary if arch.startswith("gfx") else _nvidia_binary
    shape = [launch.arguments.get(f"BLOCK_{axis}") for axis in "MVD"]
    return Resources(
        arch=arch,
        kernel=compiled.metadata.name,
        variant=variant,
        tile="×".join(str(size) for size in shape if size is not None),
        group=launch.arguments.get("GROUP", 0),
        warps=launch.warps,
        stages=launch.stages,
        shared=compiled.metadata.shared,
        layout=_sum_layout(compiled.asm["ttgir"]),
        column_tiles=launch.arguments.get("T", 0),
        again=launch.arguments.get("AGAIN", "reanchored_ptr" in launch.arguments),
        **read(compiled.asm, TENSOR_CORE[arch]),
    )


def variants(arch: str, thorough: bool) -> list[Variant]:
    """The ways to call exp_logits that are compiled: the essential ones, or every shipped one."""
    table = CONFIGS[arch]
    tensor_cores = [kind for kind in ("half", "tf32") if kind in table]
    # Every line of the table, both plain ones included.
    essential = [
        *(Variant(kind, out=True) for kind in (*tensor_cores, "ieee")),
        *(Variant(kind, out=True, few=True) for kind in tensor_cores if table[kind].halves),
        *(Variant(kind, out=True, unaligned=True) for kind in tensor_cores),
        Variant(out=True, softcap=True),
        Variant(out=False),
    ]
    if not thorough:
        return essential
    shipped = [
        Variant(kind, few=few, out=out, softcap=softcap)
        for kind in ("half", "tf32", "ieee")
        for few in (False, True)
        for out in (False, True)
        for softcap in (False, True)
        if kind in table and (table[kind].halves or not few)
    ]
    more = [
        Variant(out=True, bias=True, ragged=True),
        Variant(out=False, unaligned=True),
        Variant(out=True, softcap=True, unaligned=True),
        *(Variant(out=out, stats=(name,)) for out in (False, True) for name in STATS),
        *(Variant(out=out, stats=STATS) for out in (False, True)),
        *(Variant(out=out, stats=TRL_STATS) for out in (False, True)),
        *([Variant(out=True, few=True, stats=TRL_STATS)] if table["half"].halves else []),
        *(Variant(out=out, softcap=True, stats=TRL_STATS_CAPPED) for out in (False, True)),
        *(Variant(out=out, softcap=True, stats=("entropy",)) for out in (False, True)),
    ]
    return list(dict.fromkeys(essential + shipped + more))


def report(archs: Iterable[str], thorough: bool, only: Iterable[str] = ()) -> Iterator[Resources]:
    """Every kernel of every variant, or of those that `only` names.

    A binary that two variants share is listed once.
    """
    named = set(only)
    for arch in archs:
        seen: set[str] = set()
        for variant in variants(arch, thorough or bool(named)):
            if named and str(variant) not in named:
                continue
            for launch in exp_logits_launches(arch, variant):
                yield from _unless_seen(seen, arch, launch, str(variant))
        if named:
            continue
        for dtype in (torch.bfloat16, torch.float32) if thorough else (torch.bfloat16,):
            for softcap in (False, True) if thorough else (False,):
                name = str(dtype).removeprefix("torch.") + ("+softcap" if softcap else "")
                for launch in row_kernel_launches(dtype, softcap):
                    yield from _unless_seen(seen, arch, launch, name)


def _unless_seen(seen: set[str], arch: str, launch: Launch, variant: str) -> Iterator[Resources]:
    compiled = compile_for(arch, launch)
    if compiled.hash not in seen:
        seen.add(compiled.hash)
        yield describe(arch, launch, compiled, variant)


class _AbsentDriver:
    """Stands where Triton asks which GPU there is, to say one that is not."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # keys Triton's cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(arch: str) -> Iterator[None]:
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    before = driver._active
    driver.set_active(_AbsentDriver(target))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def _matmul_precision(kind: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _nvidia_binary(asm: dict[str, Any], tensor_core: str | tuple[str, ...]) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(tool, "--dump-resource-usage", file.name)
        sass = _output(tool, "-sass", file.name)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", sass, re.MULTILINE)
    local = re.search(r"LOCAL:(\d+)", usage)
    registers = re.search(r"REG:(\d+)", usage)
    if local is None or registers is None or not opcodes:
        raise RuntimeError(f"cuobjdump should describe the kernel, but says: {usage}")
    return {
        "registers": int(registers[1]),
        "spills": opcodes.count("STL") + opcodes.count("LDL") + int(local[1]),
        "tensor_cores": sum(opcode.startswith(tensor_core) for opcode in opcodes),
        "bulk_loads": opcodes.count("UTMALDG"),
        "bulk_stores": opcodes.count("UTMASTG"),
        "exponentials": len(re.findall(r"MUFU\.EX2", sass)),
        "instructions": len(opcodes),
    }


def _amd_binary(asm: dict[str, Any], tensor_core: str | tuple[str, ...]) -> dict[str, int]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly should state .{name}, but does not")
        return int(found[1])

    opcodes = re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, which is no memory.
        "spills": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "tensor_cores": sum(opcode.startswith(tensor_core) for opcode in opcodes),
        "bulk_loads": 0,
        "bulk_stores": 0,
        "exponentials": sum(opcode.startswith("v_exp_f32") for opcode in opcodes),
        "instructions": len(opcodes),
    }


def _sum_layout(ttgir: str) -> str:
    """How the entries that are summed over columns lie among registers, lanes and warps."""
    reduced = re.findall(r"axis = 1 : i32\}.*?\(tensor<\d+x\d+xf32, #(\w+)>\)", ttgir, re.DOTALL)
    named = dict(re.findall(r"^#(\w+) = (.+)$", ttgir, re.MULTILINE))
    return "; ".join(sorted({named[name] for name in reduced}))


def _output(*command: str | Path) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every shipped combination")
    parser.add_argument("--only", nargs="+", default=[], help="these variants, as --all calls them")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    for resources in report(options.arch, options.all, options.only):
        print(json.dumps(asdict(resources)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
