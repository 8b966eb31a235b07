"""wgmma: products of matrices in shared memory, by four warps together, while they go on.

Results are in the registers only once they have been waited for: until then these hold NaN. What
is multiplied is read at once, and may not be written before that wait.
"""

from __future__ import annotations

import re

import numpy as np

from benchmarks.instruments.ptx import floats
from benchmarks.instruments.ptx.faults import Divergence
from benchmarks.instruments.ptx.hopper import swizzled
from benchmarks.instruments.ptx.machine import Machine, Mask, Run, builds
from benchmarks.instruments.ptx.parse import Instruction, Unsupported
from benchmarks.instruments.ptx.transfers import _names, gather

GROUP = 128  # threads
_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}
_DECODE = {"bf16": floats.from_bf16, "f16": floats.from_f16, "tf32": floats.tf32_of}


class Products:
    """Per group of threads: the results under way, by registers, and what they read."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        m.resets.append(self.reset)
        self.reset()

    def reset(self) -> None:
        self.results: dict[tuple, list] = {}  # (group, registers) -> [values, batch]
        self.batch: dict[int, int] = {}  # the one that is open
        self.reads: dict[int, list[tuple[int, np.ndarray]]] = {}

    def commit(self, group: int) -> None:
        self.batch[group] = self.batch.get(group, 0) + 1

    def wait(self, group: int, most: int) -> None:
        last = self.batch.get(group, 0) - most  # batches before this one are complete
        reads = self.reads.get(group, [])
        for batch, at in reads:
            if batch < last:
                self.m.shared.leaving[at] -= 1
        self.reads[group] = [read for read in reads if read[0] >= last]
        threads = slice(group * GROUP, (group + 1) * GROUP)
        for key in [key for key in self.results if key[0] == group]:
            values, batch = self.results[key]
            if batch < last:
                del self.results[key]
                for n, name in enumerate(key[1]):
                    self.m.registers[name].view(np.float32)[threads] = values[:, n]


def _groups(m: Machine, mask: Mask) -> list[int]:
    warps = m.whole_warps(m.some(mask))
    groups, sizes = np.unique(warps // 4, return_counts=True)
    if (sizes != 4).any():
        raise Divergence("warps of a group of four are elsewhere")
    return groups.tolist()


def _tile(m: Machine, descriptor: int, rows: int, turned: bool) -> np.ndarray:
    """Places of a matrix [rows, depth]: of 32 bytes of each row, along the sum; or, `turned`, of
    each of the 16 columns, 2 · rows bytes.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> s & 0x3FFF) << 4 for s in (16, 32))
    if descriptor >> 49 & 7:
        raise Unsupported("a descriptor with a base offset")
    span = _SWIZZLES[descriptor >> 62]
    if turned:
        if not span:
            raise Unsupported("a turned matrix that is not swizzled")
        line, piece = np.mgrid[0:16, 0 : rows // 8]
        within = piece // (span // 16) * leading + piece % (span // 16) * 16
        address = start + line // 8 * stride + line % 8 * span + within
    else:
        line, piece = np.mgrid[0:rows, 0:2]
        if span:
            address = start + line // 8 * stride + line % 8 * span + 16 * piece
        else:
            address = start + line // 8 * stride + piece * leading + line % 8 * 16
    address = swizzled(address, span)
    thread = np.zeros(address.size, np.int64)
    at = m.shared.places(address.ravel().astype(np.uint64), 16, thread)
    return at.reshape(len(line), -1)


@builds("wgmma")
def warp_group(m: Machine, i: Instruction) -> Run:
    products = m.kept(Products)
    name = i.parts[1]
    if name == "fence":
        return lambda mask: None
    if name in ("commit_group", "wait_group"):
        most = int(i.operands[0], 0) if name == "wait_group" else 0

        def each(mask: Mask) -> None:
            for group in _groups(m, mask):
                if name == "commit_group":
                    products.commit(group)
                else:
                    products.wait(group, most)

        return each
    return _multiply(m, i, products)


def _multiply(m: Machine, i: Instruction, products: Products) -> Run:
    match = re.fullmatch(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.\3", i.opcode
    )
    if match is None:
        raise Unsupported(i.text)
    columns, depth, kind = int(match[1]), int(match[2]), match[3]
    dtype = np.uint32 if kind == "tf32" else np.uint16
    if depth * np.dtype(dtype).itemsize != 32:
        raise Unsupported(i.text)
    names = tuple(_names(i.operands[0]))
    if any(flag != "1" for flag in i.operands[4:6]):
        raise Unsupported(i.text)
    turned = [flag == "1" for flag in i.operands[6:]] or [False, False]
    if i.operands[1].startswith("{"):
        raise Unsupported(i.text)
    left, right = (m.read(o, "u64") for o in i.operands[1:3])
    adds = m.predicate(i.operands[3])
    # Row and column of each thread's registers.
    thread, register = np.mgrid[0:GROUP, 0 : len(names)]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 4 // 2)
    column = 8 * (register // 4) + 2 * (thread % 4) + register % 2
    registers = [m.read(one, "f32") for one in names]
    tiles: dict[tuple, np.ndarray] = {}

    def matrix(group: int, descriptor: np.ndarray, rows: int, turned: bool) -> np.ndarray:
        threads = np.arange(group * GROUP, (group + 1) * GROUP)
        values = np.unique(np.broadcast_to(descriptor, m.threads)[threads])
        if len(values) != 1:
            raise Divergence("a group's threads give different descriptors")
        what = (int(values[0]), rows, turned)
        if what not in tiles:
            tiles[what] = _tile(m, *what)
        at = tiles[what]
        addresses = at[:, 0] * m.shared.granule + m.shared.BASE
        by = np.full(len(at), threads[0])
        m.shared.check_fenced(at, addresses, by)
        m.shared.check_read(at, addresses, by)
        m.shared.leaving[at] += 1
        reads = products.reads.setdefault(group, [])
        reads.append((products.batch.get(group, 0), at))
        words = m.shared.take(at).view(dtype)
        found = _DECODE[kind](words).astype(np.float64)
        return found.T if turned else found

    def run(mask: Mask) -> None:
        for group in _groups(m, mask):
            threads = np.arange(group * GROUP, (group + 1) * GROUP)
            a = matrix(group, left, 64, turned[0])
            b = matrix(group, right, columns, turned[1])
            product = a @ b.T
            values = product[row, column]
            key = (group, names)
            if np.broadcast_to(adds(), m.threads)[threads[0]]:
                if key in products.results:
                    before = products.results[key][0]
                else:
                    before = gather(m, registers, threads, np.dtype(np.float32))
                values = values + before
            batch = products.batch.get(group, 0)
            products.results[key] = [values.astype(np.float32), batch]
            for register in registers:
                register[threads] = np.nan

    return run
