"""The checks by name, and what a check is given and answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# In the order in which they begin: what takes longest by far, then the kernels.
MODULES = (
    "benchmarks.smoke.pytorch",
    "benchmarks.smoke.models",
    "benchmarks.smoke.products",
    "benchmarks.smoke.rows",
    "benchmarks.smoke.paths",
)
# Half an ulp of what is stored, relative.
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Absent(Exception):
    """What is checked cannot run here, and why."""


@dataclass(frozen=True)
class Place:
    """Where a check runs, and on how much: no size is a multiple of a tile's."""

    device: torch.device
    rows: int
    vocab: int
    depth: int

    @classmethod
    def on(cls, device: torch.device) -> Place:
        sizes = (300, 33_000, 1024) if device.type == "cuda" else (20, 300, 48)
        return cls(device, *sizes)

    @property
    def compiled(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str | None:
        """Of the public functions: what they choose by themselves, where they would choose
        kernels.
        """
        return None if self.compiled else "triton"

    def rounding(self, dtype: torch.dtype) -> float:
        """Of storing a number. Triton's interpreter rounds to bf16 by cutting off: its cast of fp32
        ("create_fp_trunc") passes no rounding mode on, and only "nearest" would add the half.
        Compiled kernels round to the nearest, and are held to it.
        """
        cut_off = dtype == torch.bfloat16 and not self.compiled
        return _ROUNDING[dtype] * (2.0 if cut_off else 1.0)

    def module(self, backend: str) -> ModuleType:
        """The backend.

        Raises:
            Absent: it cannot run here.
        """
        try:
            found = importlib.import_module(f"fastdpo.backends.{backend}")
        except ModuleNotFoundError as error:
            raise Absent(str(error)) from error
        runs, reason = found.available()
        if runs:
            runs, reason = found.supports(self.device, torch.bfloat16)
        if not runs:
            raise Absent(reason)
        return found

    def only_compiled(self, what: str) -> None:
        if not self.compiled:
            raise Absent(f"{what} needs a CUDA device")

    def put(self, *tensors: Tensor) -> list[Tensor]:
        return [t.to(self.device) for t in tensors]


class Error(NamedTuple):
    """What is not a number is as wrong as can be."""

    name: str
    size: float
    allowed: float

    @property
    def share(self) -> float:
        if self.size == 0.0:
            return 0.0
        wrong = self.size != self.size or self.allowed <= 0.0
        return float("inf") if wrong else self.size / self.allowed

    def __str__(self) -> str:
        return f"{self.name} {self.size:.1e} of {self.allowed:.1e}"


@dataclass
class Found:
    """The errors of a check beside what is allowed, and what else is worth a word."""

    errors: list[Error] = field(default_factory=list)
    words: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def hold(self, name: str, size: float | Tensor, allowed: float) -> None:
        self.errors.append(Error(name, float(size), allowed))

    def hold_bits(self, name: str, got: Tensor, expected: Tensor) -> None:
        """As many as differ are too many; NaN is like NaN."""
        same = (got == expected) | (got.isnan() & expected.isnan())
        self.hold(f"{name}: other bits", int((~same).sum()), 0.0)

    @property
    def worst(self) -> float:
        return max((error.share for error in self.errors), default=0.0)

    def __str__(self) -> str:
        """The worst errors first."""
        worst = sorted(self.errors, key=lambda error: -error.share)[:3]
        return "; ".join([*map(str, worst), *([self.words] if self.words else [])])


Run = Callable[[Place], Found]


class Check(NamedTuple):
    run: Run
    patience: float  # how many times the usual limit it may take


CHECKS: dict[str, Check] = {}


def check(name: str, patience: float = 1.0) -> Callable[[Run], Run]:
    """Enters a function into the table."""

    def enter(run: Run) -> Run:
        if name in CHECKS:
            raise ValueError(f"name should be of one check, got {name!r} twice")
        CHECKS[name] = Check(run, patience)
        return run

    return enter


def load(more: Iterable[str] = ()) -> dict[str, Check]:
    """The table with this package's checks and those of the modules named."""
    for module in (*MODULES, *more):
        importlib.import_module(module)
    return CHECKS


def relative(got: Tensor, expected: Tensor) -> float:
    """The error's norm beside that of what is expected."""
    expected = expected.double()
    norm = float(expected.norm().clamp_min(1e-300))
    return float((got.double() - expected).norm()) / norm


def largest(got: Tensor, expected: Tensor, beside: Tensor | float = 1.0) -> float:
    """The largest error, beside a size of each entry; NaN where anything is NaN."""
    return float(((got.double() - expected.double()).abs() / beside).max())
