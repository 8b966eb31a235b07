"""Memory that the process has, as a kernel may see it: what its pointers point to, and no more."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from benchmarks.instruments.ptx.memory import Allocation


class Rows(NamedTuple):
    """What a pointer points to."""

    name: str
    address: int
    count: int
    length: int  # elements
    stride: int  # elements
    element: int  # bytes
    unwritten: bool = False  # nothing may be read that the kernel has not written
    watched: bool = True  # no two threads may touch an element, one of them writing it


def allocations(found: list[Rows]) -> list[Allocation]:
    """One for every row, or for several that adjoin or overlap."""
    spans = sorted(
        (rows.address + n * rows.stride * rows.element, rows.length * rows.element, i)
        for i, rows in enumerate(found)
        for n in range(rows.count)
    )
    merged: list[list[int]] = []
    for start, size, i in spans:
        last = merged[-1] if merged else [0, 0, -1]
        if start < last[1] or (start == last[1] and i == last[2]):
            last[1] = max(last[1], start + size)
            # An element of the one is several of the other.
            last[3] = min(last[3], found[i].element)
        else:
            merged.append([start, start + size, i, found[i].element])
    result = []
    for start, end, i, element in merged:
        data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
        one = Allocation(start, data, element, name=found[i].name, watched=found[i].watched)
        if found[i].unwritten:
            one.written = np.zeros(end - start, bool)
        result.append(one)
    return result
