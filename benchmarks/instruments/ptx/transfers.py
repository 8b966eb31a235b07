"""Loads, stores, atomics, fences and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.instruments.ptx.faults import Fault, Misaligned
from benchmarks.instruments.ptx.machine import DTYPES, Machine, Mask, Run, Step, builds
from benchmarks.instruments.ptx.parse import Instruction, Unsupported, split_operands

# What may stand between the space and the type: hints, and orderings that blocks run one after
# another have anyway.
_HINTS = {
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "weak", "relaxed", "acquire",
    "release", "acq_rel", "gpu", "cta", "sys", "L1::evict_first", "L1::evict_last",
    "L1::no_allocate", "L2::128B", "L2::256B", "L2::cache_hint", "shared::cta",
}  # fmt: skip


def _form(i: Instruction) -> tuple[str, int, str]:
    """(space, elements, type)"""
    parts = [part for part in i.parts[1:-1] if part not in _HINTS]
    count = 1
    if parts and parts[-1] in ("v2", "v4", "v8"):
        count = int(parts.pop()[1:])
    if "shared::cta" in i.parts:
        parts.append("shared")
    if len(parts) != 1 or parts[0] not in ("global", "shared", "param"):
        raise Unsupported(i.text)
    return parts[0], count, i.parts[-1]


def _names(operand: str) -> list[str]:
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


@builds("ld")
def load(m: Machine, i: Instruction) -> Run:
    space, count, kind = _form(i)
    dtype = np.dtype(DTYPES[kind])
    size = count * dtype.itemsize
    puts = [m.write(name, kind) for name in _names(i.operands[0])]
    address = m.address(i.operands[1])
    if len(puts) != count:
        raise Unsupported(i.text)
    if space == "shared":
        m.shared.serves(size)
    if space == "param" and (place := m.parameter(i.operands[1])) is not None:
        if place % size:
            raise Misaligned("parameter")

        def run_alike(mask: Mask) -> None:
            """All threads read the same."""
            for put, value in zip(puts, m.parameters[place:][:size].view(dtype), strict=True):
                put(value, mask)

        return run_alike

    def run(mask: Mask) -> None:
        some = m.some(mask)
        addresses = address(some)
        if space == "param":
            data = _parameters(m, addresses, size)
        else:
            data = (m.memory if space == "global" else m.shared).load(addresses, size, some)
        spread(m, puts, data.view(dtype), some, mask)

    return run


def spread(m: Machine, puts: list[Callable], columns: np.ndarray, some: np.ndarray, mask: Mask):
    """[n, k] results of the threads `some` into k registers."""
    whole = columns
    if mask is not None:
        whole = np.zeros((m.threads, columns.shape[1]), columns.dtype)
        whole[some] = columns
    for n, put in enumerate(puts):
        put(whole[:, n], mask)


def _parameters(m: Machine, addresses: np.ndarray, size: int) -> np.ndarray:
    at = addresses.astype(np.int64)[:, None] + np.arange(size)
    if (at % size)[:, 0].any():
        raise Misaligned("parameter")
    return m.parameters[at]


@builds("st")
def store(m: Machine, i: Instruction) -> Run:
    space, count, kind = _form(i)
    if space == "param":
        raise Unsupported(i.text)
    dtype = np.dtype(DTYPES[kind])
    address = m.address(i.operands[0])
    values = [m.read(name, kind) for name in _names(i.operands[1])]
    if len(values) != count:
        raise Unsupported(i.text)
    if space == "shared":
        m.shared.serves(count * dtype.itemsize)

    def run(mask: Mask) -> None:
        some = m.some(mask)
        data = gather(m, values, some, dtype).view(np.uint8)
        (m.memory if space == "global" else m.shared).store(address(some), data, some)

    return run


def gather(m: Machine, values: list, some: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """k operands -> [n, k] for the threads `some`."""
    result = np.empty((len(some), len(values)), dtype)
    for n, value in enumerate(values):
        result[:, n] = value[some] if np.ndim(value) else value
    return result


_ATOMIC: dict[str, Callable] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new,
    "inc": lambda old, most: np.where(old >= most, 0, old + 1),
    "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - 1),
}  # fmt: skip


@builds("atom", "red")
def atomic(m: Machine, i: Instruction) -> Run:
    """One thread after another, in an order that the seed decides."""
    parts = [part for part in i.parts[1:-1] if part not in _HINTS]
    space, name = parts
    kind = i.parts[-1]
    dtype = np.dtype(DTYPES[kind])
    returns = i.parts[0] == "atom"
    put = m.write(i.operands[0], kind) if returns else None
    rest = i.operands[returns:]
    address, values = m.address(rest[0]), [m.read(o, kind) for o in rest[1:]]
    if space not in ("global", "shared"):
        raise Unsupported(i.text)
    if space == "shared":
        m.shared.serves(dtype.itemsize)

    def run(mask: Mask) -> None:
        some = m.some(mask)
        arguments = gather(m, values, some, dtype)
        old = np.zeros((len(some), 1), dtype)
        order = m.random.permutation(len(some)) if m.shuffled else range(len(some))
        addresses = address(some)
        where = m.memory if space == "global" else m.shared
        for n in order:
            place = where.atomic(int(addresses[n]), dtype.itemsize, int(some[n])).view(dtype)
            old[n] = place
            if name == "cas":
                place[:] = arguments[n, 1] if place[0] == arguments[n, 0] else place
            else:
                place[:] = _ATOMIC[name](place, arguments[n, 0])
        if put is not None:
            spread(m, [put], old, some, mask)

    return run


@builds("membar", "discard", "prefetch", "applypriority", "createpolicy")
def nothing(m: Machine, i: Instruction) -> Run:
    """Blocks run one after another, and memory is always up to date."""
    if i.parts[0] == "createpolicy":
        return m_policy(m, i)
    return lambda mask: None


def m_policy(m: Machine, i: Instruction) -> Run:
    put = m.write(i.operands[0], "b64")
    return lambda mask: put(np.uint64(0), mask)


# ---- cp.async


class Copies:
    """Each thread's copies on their way to shared memory, in groups."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.number = 0
        m.resets.append(self.reset)
        self.reset()

    def reset(self) -> None:
        self.open: list[list] = [[] for _ in range(self.m.threads)]
        self.groups: list[list[list]] = [[] for _ in range(self.m.threads)]

    def start(self, at: np.ndarray, data: np.ndarray, some: np.ndarray) -> None:
        """To places [n, granules], data [n, size], which come later."""
        numbers = self.number + 1 + np.arange(len(some))
        self.number += len(some)
        self.m.shared.depart(at, numbers[:, None])
        for row, thread in enumerate(some.tolist()):
            self.open[thread].append((at[row], data[row]))

    def commit(self, some: np.ndarray) -> None:
        for thread in some:
            self.groups[thread].append(self.open[thread])
            self.open[thread] = []

    def wait(self, some: np.ndarray, most: int) -> None:
        """All but the last `most` groups have arrived."""
        done = []
        for thread in some:
            groups = self.groups[thread]
            ready = max(len(groups) - most, 0)
            done += [(thread, copy) for group in groups[:ready] for copy in group]
            self.groups[thread] = groups[ready:]
        # By size: those of one instruction are alike.
        for size in {len(at) for _, (at, _) in done}:
            alike = [(thread, *copy) for thread, copy in done if len(copy[0]) == size]
            threads, places, data = (np.array(part) for part in zip(*alike, strict=True))
            threads = threads[:, None]
            ticks = self.m.order.now[threads]
            self.m.shared.land(places, data, threads, ticks, by_threads=True)


@builds("cp")
def copy(m: Machine, i: Instruction) -> Run | Step:
    if i.parts[1] != "async":
        raise Unsupported(i.text)
    copies = m.kept(Copies)
    if i.parts[2] == "commit_group":
        return lambda mask: copies.commit(m.some(mask))
    if i.parts[2] == "wait_group":
        most = int(i.operands[0], 0)
        return lambda mask: copies.wait(m.some(mask), most)
    if i.parts[2] not in ("ca", "cg") or i.parts[3:5] != ["shared", "global"]:
        raise Unsupported(i.text)
    target, source = m.address(i.operands[0]), m.address(i.operands[1])
    size = int(i.operands[2], 0)
    m.shared.serves(size)
    real = m.read(i.operands[3], "u32") if len(i.operands) > 3 else np.uint32(size)

    def run(mask: Mask) -> None:
        some = m.some(mask)
        addresses, wanted = source(some), np.broadcast_to(real, m.threads)[some]
        if (wanted > size).any():
            raise Fault("more bytes from the source than are copied")
        data = np.zeros((len(some), size), np.uint8)
        for length in np.unique(wanted[wanted > 0]):
            these = np.flatnonzero(wanted == length)
            if length != size:
                raise Unsupported(i.text)
            data[these] = m.memory.load(addresses[these], size, some[these])
        targets = target(some)
        at = m.shared.places(targets, size, some)
        m.shared.check_write(at, targets, some)
        copies.start(at, data, some)

    return run


@builds("fence")
def fence(m: Machine, i: Instruction) -> Run:
    if i.opcode in ("fence.proxy.async.shared::cta", "fence.proxy.async"):
        return lambda mask: m.shared.fence(m.some(mask))
    if i.parts[1] in ("acq_rel", "sc") or i.opcode.startswith("fence.mbarrier_init"):
        return lambda mask: None
    raise Unsupported(i.text)


# ---- Matrices of 8 × 8


@builds("ldmatrix")
def load_matrix(m: Machine, i: Instruction) -> Run:
    """Lane 8·j + r has the address of row r of matrix j; lane l gets elements 2·(l % 4), + 1 of
    row l // 4.
    """
    count = _matrices(i)
    puts = [m.write(name, "b32") for name in _names(i.operands[0])]
    address = m.address(i.operands[1])
    turned = "trans" in i.parts

    def run(mask: Mask) -> None:
        some = m.some(mask)
        warps = m.whole_warps(some)
        lanes = some.reshape(len(warps), 32)[:, : 8 * count]
        rows = m.shared.load(address(lanes.ravel()), 16, lanes.ravel()).view(np.uint16)
        matrices = rows.reshape(len(warps), count, 8, 8)
        if turned:
            matrices = matrices.swapaxes(2, 3)
        parts = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), count, 32)
        spread(m, puts, parts.swapaxes(1, 2).reshape(-1, count), some, mask)

    return run


@builds("stmatrix")
def store_matrix(m: Machine, i: Instruction) -> Run:
    count = _matrices(i)
    address = m.address(i.operands[0])
    values = [m.read(name, "b32") for name in _names(i.operands[1])]
    turned = "trans" in i.parts

    def run(mask: Mask) -> None:
        some = m.some(mask)
        warps = m.whole_warps(some)
        parts = gather(m, values, some, np.dtype(np.uint32)).reshape(len(warps), 32, count)
        matrices = np.ascontiguousarray(parts.swapaxes(1, 2)).view(np.uint16)
        matrices = matrices.reshape(len(warps), count, 8, 8)
        if turned:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
        lanes = some.reshape(len(warps), 32)[:, : 8 * count].ravel()
        m.shared.store(address(lanes), rows, lanes)

    return run


def _matrices(i: Instruction) -> int:
    allowed = ["sync", "aligned", "m8n8", "trans", "shared", "b16", "shared::cta"]
    shape = [part for part in i.parts[1:] if part not in allowed]
    if len(shape) != 1 or shape[0] not in ("x1", "x2", "x4"):
        raise Unsupported(i.text)
    return int(shape[0][1:])
