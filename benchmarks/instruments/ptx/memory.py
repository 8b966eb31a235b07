"""Global and shared memory, and what may not be done to them."""

from __future__ import annotations

import numpy as np

from benchmarks.instruments.ptx.faults import Misaligned, OutOfBounds, Race, Uninitialised
from benchmarks.instruments.ptx.order import Accesses, Order
from benchmarks.instruments.ptx.parse import Unsupported


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

    def units(self, offsets: np.ndarray, size: int) -> tuple[np.dtype, np.ndarray]:
        """How `size` bytes at each offset are read at once: a type, and numbers of it [n, k]."""
        width = min(size, self.element, 8)
        if self.data.size % width or np.count_nonzero(offsets % width):
            width = 1
        return np.dtype(f"u{width}"), (offsets // width)[:, None] + np.arange(size // width)


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
            unit, at = allocation.units(offsets, size)
            if allocation.written is not None:
                written = allocation.written[offsets[:, None] + np.arange(size)].all(1)
                if not written.all():
                    bad = some[np.flatnonzero(~written)[0]]
                    raise Uninitialised(self._where("read of unwritten", addresses, threads, bad))
            if allocation.accesses is not None:
                self._race(allocation, False, offsets, size, addresses, threads, some)
            result[some] = allocation.data.view(unit)[at].view(np.uint8)
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """[n] addresses, [n, size] bytes."""
        size = values.shape[1]
        for allocation, some, offsets in self._find(addresses, size, threads):
            unit, at = allocation.units(offsets, size)
            if allocation.accesses is not None:
                self._race(allocation, True, offsets, size, addresses, threads, some)
            data, new = allocation.data.view(unit), np.ascontiguousarray(values[some]).view(unit)
            data[at] = new
            if allocation.written is not None:
                allocation.written[offsets[:, None] + np.arange(size)] = True
            differs = (data[at] != new).any(1)
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
        if np.count_nonzero(addresses % np.uint64(size)):
            bad = np.flatnonzero(addresses % np.uint64(size))[0]
            raise Misaligned(self._where(f"{size} bytes", addresses, threads, bad))
        index = np.searchsorted(self.starts, addresses, "right") - 1
        outside = index < 0
        if len(self.ends):
            outside |= addresses + np.uint64(size) > self.ends[index]
        if np.count_nonzero(outside):
            bad = np.flatnonzero(outside)[0]
            raise OutOfBounds(self._where(f"{size} bytes", addresses, threads, bad))
        if not len(index):
            return
        one = (index == index[0]).all()
        for i in index[:1] if one else np.unique(index):
            some = np.arange(len(index)) if one else np.flatnonzero(index == i)
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
        if np.count_nonzero(racing):
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
    """A block's shared memory: unwritten at first.

    What is known of it is kept per granule, the most bytes that every access of the kernel is a
    multiple of: places are numbers of granules.
    """

    BASE = 0x400  # where it begins in the shared window, as on Hopper

    def __init__(self, size: int, order: Order) -> None:
        self.size = size
        self.order = order
        self.granule = 8
        self._allocate()

    def serves(self, size: int) -> None:
        """Told for each instruction that accesses `size` bytes, before the kernel runs."""
        if size < self.granule:
            self.granule = size
            self._allocate()

    def _allocate(self) -> None:
        count = -(-self.size // self.granule)
        self.words = np.zeros(count, f"u{self.granule}")
        self.data = self.words.view(np.uint8)
        self.written = np.zeros(count, bool)
        self.flying = np.zeros(count, np.int32)  # which asynchronous copy writes here, or 0
        self.leaving = np.zeros(count, np.int32)  # which asynchronous copy reads here, or 0
        self.unfenced = np.zeros(count, bool)  # written by threads, not yet for hardware to see
        self.accesses = Accesses(count, self.order)

    def new_block(self, random: np.random.Generator) -> None:
        self.data[: self.size] = random.integers(0, 256, self.size, np.uint8)
        for array in (self.written, self.flying, self.leaving, self.unfenced):
            array.fill(0)
        self.accesses.clear()

    def take(self, places: np.ndarray) -> np.ndarray:
        """[n, granules] -> [n, bytes]"""
        return np.ascontiguousarray(self.words[places]).view(np.uint8)

    def put(self, places: np.ndarray, values: np.ndarray) -> None:
        """[n, granules], [n, bytes]"""
        self.words[places] = np.ascontiguousarray(values).view(self.words.dtype)

    def load(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        places = self.places(addresses, size, threads)
        self.check_read(places, addresses, threads)
        return self.take(places)

    def check_read(self, places: np.ndarray, addresses: np.ndarray, threads: np.ndarray) -> None:
        self._none(self.flying[places] != 0, Race, "read of a copy's target", addresses, threads)
        self._none(~self.written[places], Uninitialised, "read", addresses, threads)
        racing = self.accesses.read(places.ravel(), np.repeat(threads, places.shape[1]))
        self._none(racing.reshape(places.shape), Race, "read beside a write", addresses, threads)

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        places = self.places(addresses, values.shape[1], threads)
        self.check_write(places, addresses, threads)
        self.put(places, values)
        self.written[places] = True
        self.unfenced[places] = True
        differs = self.take(places) != values
        self._none(differs, Race, "two threads store at once", addresses, threads)

    def check_write(self, places: np.ndarray, addresses: np.ndarray, threads: np.ndarray) -> None:
        self._none(self.flying[places] != 0, Race, "write to a copy's target", addresses, threads)
        self._none(self.leaving[places] != 0, Race, "write to a copy's source", addresses, threads)
        racing = self.accesses.write(places.ravel(), np.repeat(threads, places.shape[1]))
        self._none(racing.reshape(places.shape), Race, "write beside an access", addresses, threads)

    def check_fenced(self, places: np.ndarray, addresses: np.ndarray, threads: np.ndarray) -> None:
        what = "read by the asynchronous proxy without a fence"
        self._none(self.unfenced[places], Race, what, addresses, threads)

    def depart(self, places: np.ndarray, numbers: np.ndarray) -> None:
        """Copies to here, by number, are under way: whatever was here is lost from now on."""
        self.flying[places] = numbers
        self.written[places] = False
        self.put(places, np.full((len(places), places.shape[1] * self.granule), 0xCC, np.uint8))

    def land(
        self, places: np.ndarray, values: np.ndarray, writer, tick, *, by_threads: bool
    ) -> None:
        """Copies arrive; `writer` and `tick` are noted, for all places or for each row."""
        self.put(places, values)
        self.written[places] = True
        self.flying[places] = 0
        self.unfenced[places] = by_threads
        self.accesses.note_writes(places, writer, tick)

    def fence(self, threads: np.ndarray) -> None:
        """What these threads wrote, or have seen, is there for hardware that copies on its own."""
        at = np.flatnonzero(self.unfenced)
        writers, ticks = self.accesses.writer[at], self.accesses.write_tick[at]
        now = np.full(len(at), threads[0])
        seen = np.isin(writers, threads) | self.order.before(writers, ticks, now)
        self.unfenced[at[seen]] = False

    def atomic(self, address: int, size: int, thread: int) -> np.ndarray:
        one, who = np.array([address], np.uint64), np.array([thread])
        places = self.places(one, size, who)
        self._none(~self.written[places], Uninitialised, "atomic", one, who)
        return self.data[address - self.BASE :][:size]

    def places(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """[n] addresses -> [n, size / granule]"""
        if size % self.granule:
            raise Unsupported(f"{size} bytes of shared memory, which no instruction announced")
        misaligned = (addresses % np.uint64(size) != 0)[:, None]
        self._none(misaligned, Misaligned, f"{size} bytes", addresses, threads)
        offsets = addresses.astype(np.int64) - self.BASE
        outside = ((offsets < 0) | (offsets + size > self.size))[:, None]
        self._none(outside, OutOfBounds, f"{size} bytes", addresses, threads)
        return (offsets // self.granule)[:, None] + np.arange(size // self.granule)

    def _none(self, bad: np.ndarray, kind: type[Exception], what: str, addresses, threads) -> None:
        if np.count_nonzero(bad):
            one = np.flatnonzero(bad.any(1))[0]
            offset = int(addresses[one]) - self.BASE
            raise kind(f"{what} at shared {offset:#x}, thread {int(threads[one])}")
