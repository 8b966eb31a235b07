"""What an objective is, what its options are, and the list of all of them.

An objective is a pure function, registered under its name by the decorator `objective`. The entry
carries everything that is said about it anywhere: the formula, the paper, the options and their
ranges, whether it needs a reference. `resolve` validates against it, `markdown_table` prints it,
error messages list it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor

Layout = Literal["pairs", "unpaired", "ranked"]
ReferenceUse = Literal["required", "optional", "refused"]
DivergenceUse = Literal["composes", "unaffected", "refused"]


class _Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


@dataclass(frozen=True)
class Range:
    """An interval of real numbers; an infinite end is never included."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not -math.inf < value < math.inf
        ):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        low = "−∞" if math.isinf(self.low) else f"{self.low:g}"
        high = "∞" if math.isinf(self.high) else f"{self.high:g}"
        return f"{left}{low}, {high}{right}"


POSITIVE: Final = Range(low=0.0, open_low=True)
NON_NEGATIVE: Final = Range(low=0.0)
FINITE: Final = Range()
SMOOTHING: Final = Range(0.0, 0.5, open_high=True)


@dataclass(frozen=True)
class Option:
    """One keyword option: its default (REQUIRED where there is none) and what is a valid value."""

    name: str
    default: object
    valid: str  # completes "should be ..."
    check: Callable[[object], bool]
    doc: str

    def validate(self, value: object) -> None:
        if not self.check(value):
            raise ValueError(f"{self.name} should be {self.valid}, got {describe(value)}")


@dataclass(frozen=True)
class Objective:
    """One entry of the registry.

    `fn` maps what its layout holds (see `fastdpo.objectives.layouts`) and its options to one loss
    per pair [B], per sequence [S] (unpaired) or per prompt [B] (ranked); the mean is taken by the
    caller.
    """

    name: str
    fn: Callable[..., Tensor]
    formula: str
    paper: str
    options: tuple[Option, ...] = ()
    reference: ReferenceUse = "required"
    label_smoothing: Range | None = None  # None: not defined, so it has to be 0
    f_divergence: DivergenceUse = "refused"
    layout: Layout = "pairs"
    uses_beta: bool = True  # False: beta only scales the rewards that are reported
    weightable: bool = True  # whether a weight per pair (WPO) has a meaning
    average_rewards: bool = False  # the implicit reward is beta · logps / length, not beta · logps
    reads_nll: bool = False  # fn itself reads the NLL of the chosen answers
    whole_batch: bool = False  # fn compares a batch's pairs: its loss is no sum over parts of it
    nll_weight: float | str = 0.0  # of an added NLL term, or the name of the option that holds it

    def option(self, name: str) -> Option | None:
        return next((option for option in self.options if option.name == name), None)


OBJECTIVES: Final[dict[str, Objective]] = {}


def objective(name: str, **fields: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function under `name`; `fields` are those of Objective."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is registered twice")
        OBJECTIVES[name] = Objective(name=name, fn=fn, **fields)
        return fn

    return register


def number(name: str, default: object, within: Range, doc: str) -> Option:
    return Option(name, default, f"a number in {within}", within.__contains__, doc)


def flag(name: str, default: bool, doc: str) -> Option:
    return Option(name, default, "True or False", lambda value: isinstance(value, bool), doc)


def scalar(name: str, default: object, doc: str) -> Option:
    """A finite number, or a floating tensor of one element (read on its device, its values
    unchecked)."""

    def check(value: object) -> bool:
        if isinstance(value, Tensor):
            return value.is_floating_point() and value.numel() == 1
        return value in FINITE

    return Option(name, default, "a finite number or a floating tensor of one element", check, doc)


def detached(value: float | Tensor) -> float | Tensor:
    """A `scalar` option as a number or a tensor [] that no gradient reaches."""
    return value.detach().reshape(()) if isinstance(value, Tensor) else value


def as_float(value: object) -> float:
    """The value of an option that has been validated to be a number."""
    assert isinstance(value, (int, float))
    return float(value)


def describe(value: object) -> str:
    """A value as an error message shows it; tensors by their shape and dtype, so that nothing is
    copied."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    return repr(value)


def names(objectives: Iterable[str]) -> str:
    return ", ".join(objectives)
