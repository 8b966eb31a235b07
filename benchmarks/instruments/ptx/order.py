"""Which accesses of a block's threads are ordered by its barriers.

A vector clock per thread: `seen[t, u]` is the last tick of thread u that t has synchronised with.
An access is recorded with its thread's own tick; it comes before what thread t does now if t has
seen that tick. Ticks are never used twice; those of earlier blocks count as never seen.
"""

from __future__ import annotations

import numpy as np

WARP = 32


class Order:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.warps = -(-threads // WARP)
        self.tick = 1
        self.first = 1  # of this block
        # One column more for what hardware copies on its own.
        self.seen = np.zeros((threads, threads + 1), np.int64)
        self.seen_warp = np.zeros((threads, self.warps), np.int64)
        self.seen_all = np.zeros(threads, np.int64)
        self.now = np.zeros(threads, np.int64)

    def new_block(self) -> None:
        """Nothing that came before is ordered with what follows."""
        self.tick += 1
        self.first = self.tick
        self.seen.fill(0)
        self.seen_warp.fill(0)
        self.seen_all.fill(0)
        self.now.fill(self.tick)

    def barrier(self, members: np.ndarray) -> None:
        """Everything that the members did, or had seen, comes before what they do next."""
        if members.all():
            self.seen[:, : self.threads] = self.tick
            self.seen[:, self.threads] = self.seen[:, self.threads].max()
            self.seen_warp.fill(self.tick)
            self.seen_all.fill(self.tick)
        else:
            together = self.seen[members].max(0)
            together[: self.threads][members] = self.tick
            self.join(members, together)
        self.tick += 1
        self.now[members] = self.tick

    def join(self, members: np.ndarray, other: np.ndarray) -> None:
        """The members have seen what `other`, a row of `seen`, had."""
        rows = np.maximum(self.seen[members], other)
        self.seen[members] = rows
        # A thread need not wait for itself.
        own = np.flatnonzero(members)
        rows = rows[:, : self.threads].copy()
        rows[np.arange(len(own)), own] = np.iinfo(np.int64).max
        padded = np.full((len(own), self.warps * WARP), np.iinfo(np.int64).max)
        padded[:, : self.threads] = rows
        by_warp = padded.reshape(len(own), self.warps, WARP).min(2)
        self.seen_warp[members] = by_warp
        self.seen_all[members] = by_warp.min(1)

    def before(self, who: np.ndarray, ticks: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Whether accesses (by `who`, at `ticks`) come before what threads `now` do.

        `who` is a thread, or `threads + 1 + warp` for several of that warp, or -1 for several.
        """
        last = self.seen[now, np.clip(who, 0, self.threads)]
        several = who > self.threads
        if np.count_nonzero(several):
            warp = np.clip(who - self.threads - 1, 0, self.warps - 1)
            last = np.where(several, self.seen_warp[now, warp], last)
        everyone = who == -1
        if np.count_nonzero(everyone):
            last = np.where(everyone, self.seen_all[now], last)
        return (last >= ticks) & (ticks >= self.first)


class Accesses:
    """The last accesses of every granule of a memory, and the races among them."""

    def __init__(self, granules: int, order: Order) -> None:
        self.order = order
        self.write_tick = np.zeros(granules, np.int64)
        self.writer = np.zeros(granules, np.int16)
        self.read_tick = np.zeros(granules, np.int64)
        self.reader = np.zeros(granules, np.int16)
        self.any_write = self.any_read = False  # where there is none, nothing is looked up

    def clear(self) -> None:
        self.any_write = self.any_read = False
        self.write_tick.fill(0)
        self.read_tick.fill(0)

    def read(self, at: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Notes reads of granules `at` [n] by `threads` [n]; which of them race [n]."""
        order = self.order
        racing = np.zeros(len(at), bool)
        if self.any_write:
            racing = self._unordered(self.write_tick, self.writer, at, threads)
        self.any_read = True
        beside = self._unordered(self.read_tick, self.reader, at, threads)
        was = self.reader[at]
        self.reader[at] = threads
        self.read_tick[at] = order.now[threads]
        many = beside | (self.reader[at] != threads)  # or by this very instruction
        if np.count_nonzero(many):
            at, threads, was, beside = at[many], threads[many], was[many], beside[many]
            warp = threads // WARP
            same = np.where(was > order.threads, was - order.threads - 1, was // WARP) == warp
            self.reader[at] = order.threads + 1 + warp
            mixed = (self.reader[at] != order.threads + 1 + warp) | (beside & ~same)
            self.reader[at[mixed]] = -1
        return racing

    def write(self, at: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Notes writes likewise."""
        racing = np.zeros(len(at), bool)
        if self.any_write:
            racing |= self._unordered(self.write_tick, self.writer, at, threads)
        if self.any_read:
            racing |= self._unordered(self.read_tick, self.reader, at, threads)
        self.note_writes(at, threads, self.order.now[threads])
        self.read_tick[at] = 0
        return racing

    def note_writes(self, at: np.ndarray, writers, ticks) -> None:
        self.any_write = True
        self.writer[at] = writers
        self.write_tick[at] = ticks

    def _unordered(
        self, ticks: np.ndarray, who: np.ndarray, at: np.ndarray, threads: np.ndarray
    ) -> np.ndarray:
        tick, other = ticks[at], who[at]
        found = (tick > 0) & ((other != threads) | (tick < self.order.first))
        if np.count_nonzero(found):
            some = np.flatnonzero(found)
            found[some] = ~self.order.before(other[some], tick[some], threads[some])
        return found
