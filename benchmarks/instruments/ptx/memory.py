"""Global and shared memory, and what may not be done to them."""

from __future__ import annotations

import numpy as np

from benchmarks.instruments.ptx.faults import Misaligned, OutOfBounds, Race, Uninitialised
from benchmarks.instruments.ptx.order import Accesses, Order


class Allocation:
    """Bytes at an address. Elements are what races are told apart by."""

    def __init__(
        self, address: int, data: np.ndarray, element: int = 1, *, name: str = "", watched: bool
    ) -> None:
        self.address = address
        self.data = data.view(np.uint8)
        self.element = element
        self.name = name
        self.watched = watched  # for races
        self.written: np.ndarray | None = None  # per byte, where it was handed over unwritten
        self.accesses: Accesses | None = None

    @property
    def end(self) -> int:
        return self.address + self.data.size


class Global:
    """Allocations at any addresses, with nothing between them."""

    def __init__(self, allocations: list[Allocation]) -> None:
        self.allocations = sorted(allocations, key=lambda allocation: allocation.address)
        self.starts = np.array([a.address for a in self.allocations], np.uint64)
        self.ends = np.array([a.end for a in self.allocations], np.uint64)
        if (self.ends[:-1] > self.starts[1:]).any():
            raise ValueError("allocations overlap")

    def begin(self, order: Order) -> None:
        for allocation in self.allocations:
            if allocation.watched:
                granules = -(-allocation.data.size // allocation.element)
                allocation.accesses = Accesses(granules, order)

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """[n] addresses -> [n, size] bytes."""
        result = np.empty((len(addresses), size), np.uint8)
        for allocation, some, offsets in self._find(addresses, size, threads):
            at = offsets[:, None] + np.arange(size)
            if allocation.written is not None and not allocation.written[at].all():
                bad = some[np.flatnonzero(~allocation.written[at].all(1))[0]]
                raise Uninitialised(self._where("read of unwritten", addresses, threads, bad))
            if allocation.accesses is not None:
                self._race(allocation, False, offsets, size, addresses, threads, some)
            result[some] = allocation.data[at]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """[n] addresses, [n, size] bytes."""
        size = values.shape[1]
        for allocation, some, offsets in self._find(addresses, size, threads):
            at = offsets[:, None] + np.arange(size)
            if allocation.accesses is not None:
                self._race(allocation, True, offsets, size, addresses, threads, some)
            allocation.data[at] = values[some]
            if allocation.written is not None:
                allocation.written[at] = True
            differs = (allocation.data[at] != values[some]).any(1)
            if differs.any():
                bad = some[np.flatnonzero(differs)[0]]
                raise Race(self._where("two threads store at once", addresses, threads, bad))

    def atomic(self, address: int, size: int, thread: int) -> np.ndarray:
        """The bytes to change in place."""
        one = np.array([address], np.uint64)
        (found,) = self._find(one, size, np.array([thread]))
        offset = int(found[2][0])
        return found[0].data[offset : offset + size]

    def _find(self, addresses: np.ndarray, size: int, threads: np.ndarray):
        if (addresses % np.uint64(size)).any():
            bad = np.flatnonzero(addresses % np.uint64(size))[0]
            raise Misaligned(self._where(f"{size} bytes", addresses, threads, bad))
        index = np.searchsorted(self.starts, addresses, "right") - 1
        outside = index < 0
        if len(self.ends):
            outside |= addresses + np.uint64(size) > self.ends[index]
        if outside.any():
            bad = np.flatnonzero(outside)[0]
            raise OutOfBounds(self._where(f"{size} bytes", addresses, threads, bad))
        for i in np.unique(index):
            some = np.flatnonzero(index == i)
            offsets = (addresses[some] - self.starts[i]).astype(np.int64)
            yield self.allocations[i], some, offsets

    def _race(self, allocation, writes, offsets, size, addresses, threads, some) -> None:
        element = allocation.element
        first = offsets // element
        count = max(1, size // element)
        at = (first[:, None] + np.arange(count)).ravel()
        by = np.repeat(threads[some], count)
        note = allocation.accesses.write if writes else allocation.accesses.read
        racing = note(at, by)
        if racing.any():
            bad = some[np.flatnonzero(racing)[0] // count]
            what = "store" if writes else "load"
            raise Race(self._where(f"{what} beside another thread's", addresses, threads, bad))

    def _where(self, what: str, addresses, threads, bad) -> str:
        address = int(addresses[bad])
        near = min(
            self.allocations,
            key=lambda a: max(a.address - address, address - a.end + 1, 0),
            default=None,
        )
        text = f"{what} at {address:#x}, thread {int(threads[bad])}"
        if near is not None:
            text += f", {address - near.address:+d} bytes from {near.name or 'an allocation'}"
            text += f" of {near.data.size}"
        return text


class Shared:
    """A block's shared memory: unwritten at first, byte by byte."""

    BASE = 0x400  # where it begins in the shared window, as on Hopper

    def __init__(self, size: int, order: Order) -> None:
        self.data = np.zeros(size, np.uint8)
        self.written = np.zeros(size, bool)
        self.flying = np.zeros(size, np.int32)  # which asynchronous copy writes here, or 0
        self.leaving = np.zeros(size, np.int32)  # which asynchronous copy reads here, or 0
        self.unfenced = np.zeros(size, bool)  # written by threads, not yet for hardware to see
        self.accesses = Accesses(size, order)
        self.order = order

    def new_block(self, random: np.random.Generator) -> None:
        self.data[:] = random.integers(0, 256, self.data.size, np.uint8)
        for array in (self.written, self.flying, self.leaving, self.unfenced):
            array.fill(0)
        self.accesses.clear()

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        at = self._at(addresses, size, threads)
        self.check_read(at, addresses, threads)
        return self.data[at]

    def check_read(self, at: np.ndarray, addresses: np.ndarray, threads: np.ndarray) -> None:
        self._none(self.flying[at] != 0, Race, "read of a copy's target", addresses, threads)
        self._none(~self.written[at], Uninitialised, "read", addresses, threads)
        racing = self.accesses.read(at.ravel(), np.repeat(threads, at.shape[1]))
        self._none(racing.reshape(at.shape), Race, "read beside a write", addresses, threads)

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        at = self._at(addresses, values.shape[1], threads)
        self.check_write(at, addresses, threads)
        self.data[at] = values
        self.written[at] = True
        self.unfenced[at] = True
        differs = self.data[at] != values
        self._none(differs, Race, "two threads store at once", addresses, threads)

    def check_write(
        self, at: np.ndarray, addresses: np.ndarray, threads: np.ndarray, by: int | None = None
    ) -> None:
        self._none(self.flying[at] != 0, Race, "write to a copy's target", addresses, threads)
        self._none(self.leaving[at] != 0, Race, "write to a copy's source", addresses, threads)
        racing = self.accesses.write(at.ravel(), np.repeat(threads, at.shape[1]), by)
        self._none(racing.reshape(at.shape), Race, "write beside an access", addresses, threads)

    def check_fenced(self, at: np.ndarray, addresses: np.ndarray, threads: np.ndarray) -> None:
        what = "read by the asynchronous proxy without a fence"
        self._none(self.unfenced[at], Race, what, addresses, threads)

    def fence(self, threads: np.ndarray) -> None:
        """What these threads wrote, or have seen, is there for hardware that copies on its own."""
        at = np.flatnonzero(self.unfenced)
        writers, ticks = self.accesses.writer[at], self.accesses.write_tick[at]
        now = np.full(len(at), threads[0])
        seen = np.isin(writers, threads) | self.order.before(writers, ticks, now)
        self.unfenced[at[seen]] = False

    def atomic(self, address: int, size: int, thread: int) -> np.ndarray:
        one, who = np.array([address], np.uint64), np.array([thread])
        at = self._at(one, size, who)
        self._none(~self.written[at], Uninitialised, "atomic", one, who)
        return self.data[at[0, 0] : at[0, 0] + size]

    def _at(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        misaligned = (addresses % np.uint64(size) != 0)[:, None]
        self._none(misaligned, Misaligned, f"{size} bytes", addresses, threads)
        offsets = addresses.astype(np.int64) - self.BASE
        outside = ((offsets < 0) | (offsets + size > self.data.size))[:, None]
        self._none(outside, OutOfBounds, f"{size} bytes", addresses, threads)
        return offsets[:, None] + np.arange(size)

    def _none(self, bad: np.ndarray, kind: type[Exception], what: str, addresses, threads) -> None:
        if bad.any():
            one = np.flatnonzero(bad.any(1))[0]
            offset = int(addresses[one]) - self.BASE
            raise kind(f"{what} at shared {offset:#x}, thread {int(threads[one])}")
