"""Hand-written PTX for the executor's own tests."""

from __future__ import annotations

import numpy as np

from benchmarks.instruments.ptx import instructions  # noqa: F401
from benchmarks.instruments.ptx.hopper import Descriptor
from benchmarks.instruments.ptx.machine import Machine
from benchmarks.instruments.ptx.memory import Allocation, Global
from benchmarks.instruments.ptx.parse import parse

ADDRESS = 0x10000  # of the buffer that the snippets are given
_REGISTERS = """
.reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .f32 %f<32>;
.reg .b64 %rd<16>; .reg .f64 %fd<16>;
"""


def run(
    body: str,
    buffer: np.ndarray | None = None,
    *,
    threads: int = 32,
    blocks: int = 1,
    seed: int = 0,
    unwritten: bool = False,  # may the buffer be read before it is written?
    descriptors: dict[int, Descriptor] | None = None,
) -> np.ndarray:
    """`%rd1` is the buffer's address, `%r1` the thread, `%rd2` its 16 bytes of the buffer, `%r3`
    the tile in shared memory, `%r4` the thread's word of it.
    """
    buffer = np.zeros(64 * 16, np.uint8) if buffer is None else buffer
    text = f"""
    .visible .entry test(.param .u64 test_param_0) {{ {_REGISTERS}
    .shared .align 1024 .b8 tile[4096];
    ld.param.u64 %rd1, [test_param_0]; mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 16; add.s64 %rd2, %rd1, %rd3; shl.b32 %r2, %r1, 2;
    mov.u32 %r3, tile; add.s32 %r4, %r3, %r2;
    {body}
    ret; }}
    """
    allocation = Allocation(ADDRESS, buffer, 4, name="buffer", watched=True)
    if unwritten:
        allocation.written = np.zeros(buffer.size, bool)
    parameters = np.array([ADDRESS], np.uint64).view(np.uint8)
    machine = Machine(parse(text)["test"], threads)
    options = {"seed": seed, "descriptors": descriptors}
    machine.launch(Global([allocation]), parameters, (blocks,), **options)
    return buffer


def result(instruction: str, *inputs, to: type = np.uint32) -> np.generic:
    """The instruction's d, given a, b and c as registers of their types."""
    kinds = {4: ("%r", "b32"), 8: ("%rd", "b64"), 2: ("%h", "b16")}
    lines, text = [], instruction
    for n, value in enumerate(inputs):
        size = value.itemsize
        prefix, kind = kinds[size]
        bits = int(value.view(f"u{size}"))
        lines.append(f"mov.{kind} {prefix}{8 + n}, {bits};")
        text = text.replace(f"<{'abc'[n]}>", f"{prefix}{8 + n}")
    prefix, kind = kinds[np.dtype(to).itemsize]
    text = text.replace("<d>", f"{prefix}12")
    found = run("\n".join([*lines, text, f"st.global.{kind} [%rd2], {prefix}12;"]))
    return found.view(to)[0]
