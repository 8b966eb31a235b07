"""What only Hopper has: copies of tensor blocks, and barriers in shared memory that await them.

A copy starts when it is issued and lands any time before the barrier's phase completes: at once, or
when nobody else can go on, as the seed decides. What it writes cannot be touched until then, what
it reads cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.instruments.ptx.faults import Fault
from benchmarks.instruments.ptx.machine import Machine, Mask, Run, Step, builds
from benchmarks.instruments.ptx.memory import Shared
from benchmarks.instruments.ptx.parse import Instruction, Unsupported, split_operands

ALIGNMENT = 128  # of a block in shared memory


@dataclass
class Descriptor:
    """A matrix in global memory and the block of it that is copied at once."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    block: tuple[int, ...]
    element: int  # bytes
    swizzle: int  # bytes of a row of the pattern in shared memory, or 0

    def places(self, x: int, y: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the block whose first element is (y, x), in 16-byte pieces [n]: the addresses in
        global memory, those in shared memory, and how many of the bytes lie inside the matrix.
        """
        rows, width = self.block[0], self.block[1] * self.element
        row, piece = (a.ravel() for a in np.mgrid[0:rows, 0 : width // 16])
        shared = swizzled(target + row * width + 16 * piece, self.swizzle)
        first = x + 16 * piece // self.element
        place = self.address + ((y + row) * self.strides[0] + first) * self.element
        inside = np.clip((self.shape[1] - first) * self.element, 0, 16)
        inside = np.where((y + row < self.shape[0]) & (x >= 0) & (y >= 0), inside, 0)
        return place.astype(np.uint64), shared, inside


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Where hardware puts 16 bytes: which of a row's pieces depends on the row."""
    if span == 0:
        return address
    return address ^ (((address >> 7) & (span // 16 - 1)) << 4)


class Barrier:
    def __init__(self, count: int, threads: int) -> None:
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0
        self.seen = np.zeros(threads + 1, np.int64)  # by whoever has arrived
        self.completed = self.seen.copy()

    def complete(self) -> bool:
        if self.pending or self.bytes:
            return False
        self.phase += 1
        self.pending = self.count
        self.completed = self.seen.copy()
        return True


class Hopper:
    """Barriers by address, and copies under way."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        m.resets.append(self.reset)
        m.deliver.append(self.deliver)
        self.number = 0
        self.reset()

    def reset(self) -> None:
        self.barriers: dict[int, Barrier] = {}
        self.flying: list[Callable[[], None]] = []
        self.open: dict[int, list[np.ndarray]] = {}  # per thread, what its stores still read
        self.groups: dict[int, list[list[np.ndarray]]] = {}

    def deliver(self) -> bool:
        flying, self.flying = self.flying, []
        for index in self.m.random.permutation(len(flying)):
            flying[index]()
        return bool(flying)

    def barrier(self, address: int) -> Barrier:
        if address not in self.barriers:
            raise Fault(f"no barrier at shared {address - Shared.BASE:#x}")
        return self.barriers[address]

    def arrive(self, barrier: Barrier, thread: int, expected: int) -> None:
        order = self.m.order
        barrier.bytes += expected
        barrier.pending -= 1
        if barrier.pending < 0:
            raise Fault("more arrivals than a barrier counts")
        barrier.seen = np.maximum(barrier.seen, order.seen[thread])
        barrier.seen[thread] = order.now[thread]
        order.tick += 1
        order.now[thread] = order.tick
        self.m.changed |= barrier.complete()

    def start_load(self, d: Descriptor, x: int, y: int, target: int, address: int, thread: int):
        m, shared = self.m, self.m.shared
        if target % ALIGNMENT:
            raise Fault(f"a block at shared {target - Shared.BASE:#x}")
        place, pieces, inside = d.places(x, y, target)
        data = np.zeros((len(place), 16), np.uint8)
        for size in np.unique(inside[inside > 0]):
            some = np.flatnonzero(inside == size)
            data[some, :size] = _load(m, place[some], int(size), thread, d.element)
        threads = np.full(len(pieces), thread)
        at = shared.places(pieces.astype(np.uint64), 16, threads)
        shared.check_write(at, pieces, threads)
        self.number += 1
        shared.depart(at, np.int32(self.number))
        barrier = self.barrier(address)

        def land() -> None:
            m.order.tick += 1
            shared.land(at, data, m.threads, m.order.tick, by_threads=False)
            barrier.seen[m.threads] = m.order.tick
            barrier.bytes -= data.size
            m.changed |= barrier.complete()

        self.flying.append(land)
        if m.shuffled and m.random.random() < 0.5:
            self.deliver()

    def start_store(self, d: Descriptor, x: int, y: int, source: int, thread: int) -> None:
        m, shared = self.m, self.m.shared
        if source % ALIGNMENT:
            raise Fault(f"a block at shared {source - Shared.BASE:#x}")
        place, pieces, inside = d.places(x, y, source)
        threads = np.full(len(pieces), thread)
        at = shared.places(pieces.astype(np.uint64), 16, threads)
        shared.check_fenced(at, pieces, threads)
        shared.check_read(at, pieces, threads)
        shared.leaving[at] += 1
        self.open.setdefault(thread, []).append(at)
        for size in np.unique(inside[inside > 0]):
            some = np.flatnonzero(inside == size)
            columns = np.ascontiguousarray(shared.take(at[some])[:, :size])
            elements = columns.reshape(-1, d.element)
            places = place[some, None] + np.arange(0, size, d.element, dtype=np.uint64)
            m.memory.store(places.ravel(), elements, np.full(len(elements), thread))

    def commit(self, some: np.ndarray) -> None:
        for thread in some.tolist():
            self.groups.setdefault(thread, []).append(self.open.pop(thread, []))

    def wait(self, some: np.ndarray, most: int) -> None:
        for thread in some.tolist():
            groups = self.groups.get(thread, [])
            ready = max(len(groups) - most, 0)
            for at in (at for group in groups[:ready] for at in group):
                self.m.shared.leaving[at] -= 1
            self.groups[thread] = groups[ready:]


def _load(m: Machine, place: np.ndarray, size: int, thread: int, element: int) -> np.ndarray:
    """[n, size] bytes, element by element: the matrix is all that is read."""
    places = place[:, None] + np.arange(0, size, element, dtype=np.uint64)
    found = m.memory.load(places.ravel(), element, np.full(places.size, thread))
    return found.reshape(len(place), size)


@builds("mbarrier")
def memory_barrier(m: Machine, i: Instruction) -> Run | Step:
    hopper, shared = m.kept(Hopper), m.shared
    parts = [part for part in i.parts[1:] if part not in ("shared::cta", "shared", "b64")]
    operands = i.operands
    address = m.address(operands[0 if parts[0] in ("init", "inval") else 1])

    def touch(some: np.ndarray, write: bool) -> np.ndarray:
        addresses = address(some)
        at = shared.places(addresses, 8, some)
        if write:
            shared.check_write(at, addresses, some)
            shared.written[at] = True
        else:
            shared.check_read(at, addresses, some)
        return addresses.astype(np.int64)

    if parts in (["init"], ["inval"]):
        count = m.read(operands[1], "u32") if parts == ["init"] else None

        def change(mask: Mask) -> None:
            some = m.some(mask)
            for thread, place in zip(some, touch(some, True), strict=True):
                if count is None:
                    hopper.barrier(place)
                    del hopper.barriers[place]
                else:
                    counts = np.broadcast_to(count, m.threads)
                    hopper.barriers[place] = Barrier(int(counts[thread]), m.threads)

        return change
    if parts[0] == "arrive":
        if parts not in (["arrive"], ["arrive", "expect_tx"]) or operands[0] != "_":
            raise Unsupported(i.text)
        expected = m.read(operands[2], "u32") if len(parts) == 2 else np.uint32(0)

        def arrive(mask: Mask) -> None:
            some = m.some(mask)
            sizes = np.broadcast_to(expected, m.threads)
            for thread, place in zip(some, touch(some, False), strict=True):
                hopper.arrive(hopper.barrier(place), int(thread), int(sizes[thread]))

        return arrive
    if parts != ["try_wait", "parity"]:
        raise Unsupported(i.text)
    put, parity = m.write(operands[0], "pred"), m.read(operands[2], "u32")

    def wait(mask: Mask) -> np.ndarray:
        """Those whose phase is complete go on; the others try again when something changes."""
        some = m.some(mask)
        done = np.zeros(m.threads, bool)
        places = touch(some, False)
        wanted = np.broadcast_to(parity, m.threads)[some] & 1
        for place in np.unique(places):
            barrier = hopper.barrier(int(place))
            ready = some[(places == place) & (barrier.phase % 2 != wanted)]
            if len(ready):
                done[ready] = True
                members = np.zeros(m.threads, bool)
                members[ready] = True
                m.order.join(members, barrier.completed)
        put(np.ones(m.threads, bool), done)
        return done

    return Step(wait, "wait")


@builds("cp.async.bulk")
def bulk_copy(m: Machine, i: Instruction) -> Run:
    hopper = m.kept(Hopper)
    # A block is a cluster of its own.
    form = ".".join(i.parts[3:]).replace("shared::cluster", "shared::cta")
    if form == "commit_group":
        return lambda mask: hopper.commit(m.some(mask))
    if form in ("wait_group", "wait_group.read"):
        most = int(i.operands[0], 0)
        return lambda mask: hopper.wait(m.some(mask), most)
    loads = form == "tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
    if not loads and form != "tensor.2d.global.shared::cta.bulk_group":
        raise Unsupported(i.text)
    block, tensor = i.operands[:2] if loads else i.operands[1::-1]
    name, place = split_operands(tensor[1:-1])
    descriptor, shared = m.address(f"[{name}]"), m.address(block)
    x, y = (m.read(o, "s32") for o in split_operands(place[1:-1]))
    barrier = m.address(i.operands[2]) if loads else None

    def run(mask: Mask) -> None:
        some = m.some(mask)
        barriers = barrier(some) if barrier else [None] * len(some)
        rows = zip(some.tolist(), descriptor(some), shared(some), barriers, strict=True)
        for thread, which, place, bar in rows:
            d = m.descriptors.get(int(which))
            if d is None:
                raise Fault(f"no descriptor at {int(which):#x}")
            at = [int(np.broadcast_to(v, m.threads)[thread]) for v in (x, y)]
            if bar is None:
                hopper.start_store(d, *at, int(place), thread)
            else:
                hopper.start_load(d, *at, int(place), int(bar), thread)

    return run
