"""A kernel launch as a value: run on a GPU or in the interpreter, or compiled ahead of time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .language import INTERPRETED


class Launch(NamedTuple):
    kernel: Any  # a triton.jit function, perhaps under triton.heuristics
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        # Contraction is off so that a sum's bits depend on the source alone; the kernels say fma
        # where they mean it.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


class Target(NamedTuple):
    """What the launches are for."""

    arch: str  # "sm_90", "gfx942", "interpreter"
    processors: int  # how many programs run at once, for kernels that loop over their tiles


def interpreted() -> bool:
    return bool(INTERPRETED.value)


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """On the device's current stream."""
    with on_device(device):
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Launches go to the device that is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def target_of(like: Tensor) -> Target:
    # Three programs, so that the interpreter's loops over tiles have something to skip.
    return Target("interpreter", 3) if interpreted() else _device_target(like.get_device())


@functools.cache
def _device_target(index: int) -> Target:
    with torch.cuda.device(index):
        target = triton.runtime.driver.active.get_current_target()
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return Target(arch, torch.cuda.get_device_properties(index).multi_processor_count)
