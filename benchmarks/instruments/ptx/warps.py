"""Control flow, barriers, and what the lanes of a warp do together."""

from __future__ import annotations

import numpy as np

from benchmarks.instruments.ptx import floats
from benchmarks.instruments.ptx.faults import Divergence
from benchmarks.instruments.ptx.machine import Machine, Mask, Run, Step, builds
from benchmarks.instruments.ptx.order import WARP
from benchmarks.instruments.ptx.parse import Instruction, Unsupported
from benchmarks.instruments.ptx.transfers import _names, gather, spread

ALL = 0xFFFFFFFF


@builds("bra")
def branch(m: Machine, i: Instruction) -> Step:
    return Step(lambda mask: None, "branch")


@builds("ret", "exit")
def leave(m: Machine, i: Instruction) -> Step:
    return Step(lambda mask: None, "exit")


@builds("bar", "barrier")
def barrier(m: Machine, i: Instruction) -> Run | Step:
    parts = [part for part in i.parts[1:] if part not in ("cta", "aligned")]
    if parts == ["warp", "sync"]:
        return _warp_barrier(m, i)
    if parts not in (["sync"], ["arrive"]):
        raise Unsupported(i.text)
    name = m.read(i.operands[0], "u32")
    count = int(i.operands[1], 0) if len(i.operands) > 1 else None
    aligned = i.parts[0] == "bar" or "aligned" in i.parts

    def run(mask: Mask) -> tuple[int, int | None, bool]:
        some = m.some(mask)
        if aligned:
            m.whole_warps(some)
        names = np.unique(np.broadcast_to(name, m.threads)[some])
        if len(names) != 1:
            raise Unsupported(f"{i.text}: several barriers at once")
        return int(names[0]), count, parts == ["sync"]

    return Step(run, "barrier")


def _present(m: Machine, mask: Mask, members) -> np.ndarray:
    """Threads here; every lane that a member names must be among them."""
    some = m.some(mask)
    if mask is None and m.threads % WARP == 0:
        return some
    here = np.zeros(m.warp_sizes.size * WARP, bool)
    here[some] = True
    lanes = np.packbits(here.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)[:, 0]
    wanted = np.broadcast_to(members, m.threads)[some]
    if (wanted & ~lanes[m.warp_of[some]]).any():
        raise Divergence("waits for lanes of its warp that are elsewhere")
    return some


def _warp_barrier(m: Machine, i: Instruction) -> Run:
    members = m.read(i.operands[0], "u32")

    def run(mask: Mask) -> None:
        some = _present(m, mask, members)
        for warp in np.unique(m.warp_of[some]):
            together = np.zeros(m.threads, bool)
            together[some[m.warp_of[some] == warp]] = True
            m.order.barrier(together)

    return run


@builds("shfl")
def shuffle(m: Machine, i: Instruction) -> Run:
    _, sync, mode, kind = i.parts
    if sync != "sync" or kind != "b32":
        raise Unsupported(i.text)
    targets = i.operands[0].split("|")
    puts = [m.write(targets[0], "b32"), *(m.write(target, "pred") for target in targets[1:])]
    value = m.read(i.operands[1], "b32")
    by, clamp, members = (m.read(o, "u32") for o in i.operands[2:])
    lane = (m.everyone % WARP).astype(np.int64)

    def sources() -> tuple[np.ndarray, np.ndarray]:
        """Which thread each takes from, and whether that is within its segment."""
        distance = np.asarray(by).astype(np.int64) & 31
        last, segment = (np.asarray(clamp).astype(np.int64) >> s & 31 for s in (0, 8))
        highest = (lane & segment) | (last & ~segment)
        lowest = lane & segment
        if mode == "up":
            source = lane - distance
            inside = source >= highest
        elif mode == "down":
            source = lane + distance
            inside = source <= highest
        elif mode == "bfly":
            source = lane ^ distance
            inside = source <= highest
        else:
            source = lowest | (distance & ~segment)
            inside = source <= highest
        source = np.where(inside, source, lane) + m.everyone - lane
        return np.broadcast_to(source, m.threads), inside

    constant = sources() if np.ndim(by) == np.ndim(clamp) == 0 else None

    def run(mask: Mask) -> None:
        some = _present(m, mask, members)
        source, inside = constant or sources()
        if len(some) < m.threads or m.threads % WARP:
            absent = np.setdiff1d(source[some], some)
            if len(absent):
                raise Divergence(f"takes from thread {absent[0]}, which is elsewhere")
        result = np.broadcast_to(value, m.threads)[np.minimum(source, m.threads - 1)]
        puts[0](result, mask)
        for put in puts[1:]:
            put(inside, mask)

    return run


def _by_warp(m: Machine, some: np.ndarray, values: np.ndarray, missing) -> np.ndarray:
    """[warps, 32], with `missing` for lanes that are elsewhere."""
    table = np.full(m.warp_sizes.size * WARP, missing, values.dtype)
    table[some] = values[some]
    return table.reshape(-1, WARP)


@builds("vote")
def vote(m: Machine, i: Instruction) -> Run:
    _, sync, mode, kind = i.parts
    if sync != "sync":
        raise Unsupported(i.text)
    put, value = m.write(i.operands[0], kind), m.predicate(i.operands[1])
    members = m.read(i.operands[2], "u32")

    def run(mask: Mask) -> None:
        some = _present(m, mask, members)
        values = np.broadcast_to(value(), m.threads)
        if mode == "any":
            result = _by_warp(m, some, values, False).any(1)
        elif mode == "all":
            result = _by_warp(m, some, values, True).all(1)
        elif mode == "ballot":
            table = _by_warp(m, some, values, False)
            result = np.packbits(table, axis=1, bitorder="little").view(np.uint32)[:, 0]
        else:
            raise Unsupported(i.text)
        put(result[m.warp_of], mask)

    return run


@builds("redux")
def reduce(m: Machine, i: Instruction) -> Run:
    _, _sync, name, kind = i.parts
    f = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[name]  # fmt: skip
    put, value = m.write(i.operands[0], kind), m.read(i.operands[1], kind)
    members = m.read(i.operands[2], "u32")

    def run(mask: Mask) -> None:
        some = _present(m, mask, members)
        result = np.zeros(m.threads, value.dtype)
        values = np.broadcast_to(value, m.threads)
        for warp in np.unique(m.warp_of[some]):
            lanes = some[m.warp_of[some] == warp]
            result[lanes] = f.reduce(values[lanes])
        put(result, mask)

    return run


@builds("activemask")
def active(m: Machine, i: Instruction) -> Run:
    put = m.write(i.operands[0], "b32")

    def run(mask: Mask) -> None:
        here = _by_warp(m, m.some(mask), np.ones(m.threads, bool), False)
        put(np.packbits(here, axis=1, bitorder="little").view(np.uint32)[:, 0][m.warp_of], mask)

    return run


@builds("elect")
def elect(m: Machine, i: Instruction) -> Run:
    """One lane of a warp: the lowest."""
    targets = i.operands[0].split("|")
    put_lane, put = m.write(targets[0], "b32"), m.write(targets[1], "pred")
    members = m.read(i.operands[1], "u32")

    def run(mask: Mask) -> None:
        some = _present(m, mask, members)
        _, firsts = np.unique(m.warp_of[some], return_index=True)
        chosen = np.zeros(m.threads, bool)
        chosen[some[firsts]] = True
        lane = np.zeros(m.warp_sizes.size, np.uint32)
        lane[m.warp_of[some[firsts]]] = some[firsts] % WARP
        put_lane(lane[m.warp_of], mask)
        put(chosen, mask)

    return run


# ---- mma.sync: the fragments' layout is in the PTX manual, "Matrix fragments for mma"

_MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, 2, floats.from_bf16),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, 2, floats.from_f16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (8, 1, floats.tf32_of),
}


@builds("mma")
def multiply_matrices(m: Machine, i: Instruction) -> Run:
    """D [16, 8] = A [16, k] · B [k, 8] + C, summed in fp64 and rounded once."""
    k, packed, decode = _MMA[i.opcode.removeprefix("mma.sync.aligned.")]
    puts = [m.write(name, "f32") for name in _names(i.operands[0])]
    a, b = ([m.read(name, "b32") for name in _names(o)] for o in i.operands[1:3])
    c = [m.read(name, "f32") for name in _names(i.operands[3])]
    lane = np.arange(WARP)
    row, column = lane // 4, lane % 4

    def elements(registers: list, some: np.ndarray, warps: int) -> np.ndarray:
        """[warps, 32, registers, packed] in fp64."""
        words = gather(m, registers, some, np.dtype(np.uint32))
        words = words.view(np.uint16) if packed == 2 else words
        return decode(words).astype(np.float64).reshape(warps, WARP, len(registers), packed)

    def run(mask: Mask) -> None:
        some = m.some(mask)
        warps = len(m.whole_warps(some))
        left, right = np.empty((warps, 16, k)), np.empty((warps, k, 8))
        part_a, part_b = elements(a, some, warps), elements(b, some, warps)
        for n in range(packed):
            at = packed * column + n
            for r in range(4):
                left[:, row + 8 * (r % 2), at + k // 2 * (r // 2)] = part_a[:, :, r, n]
            for r in range(2):
                right[:, at + k // 2 * r, row] = part_b[:, :, r, n]
        product = left @ right
        sums = gather(m, c, some, np.dtype(np.float32)).reshape(warps, WARP, 4).astype(np.float64)
        for r in range(4):
            sums[:, :, r] += product[:, row + 8 * (r // 2), 2 * column + r % 2]
        spread(m, puts, sums.reshape(-1, 4).astype(np.float32), some, mask)

    return run
