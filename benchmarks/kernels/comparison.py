"""What the comparisons of `benchmarks.kernels` have in common: shapes, floors, and who takes part.

A product is held against the vendor's product of the same shape, everything else against a device
copy that moves as many bytes. Inputs rotate, so that a cache that held the last call's does not
help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.traffic import Work
from benchmarks.measure import Step
from benchmarks.scenarios import HEADS
from fastdpo.backends import select
from fastdpo.backends.select import BackendUnavailable

ROTATE = 2
# Of what a memory-bound contender reads or writes in turn: no GPU's L2 holds the last call's.
_BEYOND_CACHES, _MOST_SETS = 256 << 20, 16
COPY = "a copy of as many bytes"


@dataclass
class Comparison:
    """One primitive on one shape: its floor, and those that are held against it."""

    name: str
    shape: dict[str, Any]
    work: Work
    floor_is: str
    floor: Step
    steps: dict[str, Step]  # by backend
    absent: dict[str, str]  # backend -> why


@dataclass(frozen=True)
class Shape:
    head: str
    rows: int
    dtype: torch.dtype = torch.bfloat16

    def as_dict(self) -> dict[str, Any]:
        d, vocab, softcap = HEADS[self.head]
        name = str(self.dtype).removeprefix("torch.")
        return {"head": self.head, "N": self.rows, "V": vocab, "D": d, "softcap": softcap} | {
            "dtype": name
        }


def serving(primitive: str, like: Tensor) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The backends that implement and can run it here, and why the others do not."""
    found: dict[str, ModuleType] = {}
    absent: dict[str, str] = {}
    for name in select.NAMES:
        try:
            module = select.primitive(primitive, like, name)
        except (BackendUnavailable, ImportError) as error:
            absent[name] = str(error)
            continue
        if module.__name__.rpartition(".")[2] == name:
            found[name] = module
        else:
            absent[name] = f"the {name} backend does not implement it"
    return found, absent


def sets(size: float) -> int:
    """How many sets of `size` bytes a memory-bound comparison turns through."""
    return min(_MOST_SETS, math.ceil(_BEYOND_CACHES / max(1.0, size)))


def copy_of(size: float, device: torch.device) -> Step:
    """A copy that reads and writes `size` bytes together."""
    half = max(1, int(size) // 2)
    count = max(ROTATE, sets(half))
    source, target = (torch.empty(count, half, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda i: target[i % count].copy_(source[i % count])
