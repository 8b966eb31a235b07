"""Seconds of a step: interleaved rounds, rotated inputs, medians with 20th and 80th percentile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[int], object]  # the round's number -> anything
# A GPU's cycles, about a millisecond, that it sleeps before a timed step: the host queues the step
# meanwhile, as it does in a training loop, and its own time is not taken for the device's.
_HEAD_START = 2_000_000


@dataclass(frozen=True)
class Protocol:
    """How long to measure."""

    warmup: int = 1
    min_rounds: int = 3
    max_rounds: int = 30
    seconds: float = 20.0  # of measuring per contender: rounds stop here once there are enough
    # Untimed calls right before each timed one. On a CPU, memory that the step before gave back
    # must be faulted in again, and whoever needs most would pay for its neighbours: a training
    # loop, which repeats one step, does not.
    settle: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "order": "interleaved, rotated by one each round"}


class Deadline:
    """A moment after which nothing new is begun."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    @property
    def remaining(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()


def interleaved(
    steps: dict[str, Step],
    device: torch.device,
    protocol: Protocol,
    tick: Callable[[str], None] = lambda name: None,
    deadline: Deadline | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every step in every round; each round runs all of them, begun one further on.

    A step that raises is told to `failed` and left out from then on; without `failed` it ends the
    measuring.
    """
    names = list(steps)
    taken: dict[str, list[float]] = {name: [] for name in steps}

    def attempt(name: str, action: Callable[[], None]) -> None:
        tick(name)
        try:
            action()
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            names.remove(name)
            del taken[name]

    def warm_up(name: str) -> None:
        for i in range(protocol.warmup):
            steps[name](i)
        synchronize(device)

    def measure(name: str, i: int) -> None:
        for _ in range(protocol.settle):
            steps[name](i)
        taken[name].append(timed(steps[name], i, device))

    for name in steps:
        attempt(name, lambda n=name: warm_up(n))
    limit = protocol.seconds * len(names)
    start = time.perf_counter()
    for i in range(protocol.max_rounds):
        enough = i >= protocol.min_rounds and time.perf_counter() - start > limit
        if enough or (i > 0 and deadline is not None and deadline.passed):
            break
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            attempt(name, lambda n=name, i=i: measure(n, i))
    return taken


def timed(step: Step, i: int, device: torch.device) -> float:
    """Seconds of one call: device events on a GPU, the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        step(i)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    step(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantiles(values: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and how many."""
    if not values:
        raise ValueError("values should hold at least one measurement, got none")
    wanted = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(values, dtype=torch.float64).quantile(wanted).tolist()
    return {"median": median, "p20": p20, "p80": p80, "rounds": len(values)}
