"""The longest pair that fits: the most positions of two sequences that one step can take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.inputs import make_inputs
from benchmarks.loss.runner import why_not
from benchmarks.measure import Deadline
from benchmarks.memory import extra
from benchmarks.providers import Provider, by_name
from benchmarks.scenarios import DTYPES, Scenario
from fastdpo.demo.peak import peak_bytes

_FIRST, _MOST = 256, 1 << 22  # positions of the pair
_STEPS = 4  # of bisection: the answer is within 1/16 of a doubling


def find_all(
    scenario: Scenario,
    device: torch.device,
    limit: int,
    names: list[str] | None = None,
    tick: Callable[[str], None] = lambda text: None,
    deadline: Deadline | None = None,
) -> list[dict[str, Any]]:
    """One row per provider: positions of the longest pair whose step stays within `limit` bytes,
    weight, hidden states and gradients included.
    """
    rows = []
    pair = replace(scenario, sequences=2, tokens=_FIRST)
    for provider in by_name(names):
        row: dict[str, Any] = {"provider": provider.name, "status": "ok"}
        row |= {"scenario": pair.as_dict(), "limit_bytes": limit}
        excuse = why_not(provider, pair, device)
        if excuse:
            row["status"], row["reason"] = excuse
        elif deadline is not None and deadline.passed:
            row["status"], row["reason"] = "skipped", "no time was left"
        else:
            tick(provider.name)
            try:
                row["max_tokens"] = longest(_fitting(provider, pair, device, limit, deadline))
            except TimeoutError:
                row["status"], row["reason"] = "skipped", "no time was left"
        rows.append(row)
    return rows


def _fitting(
    provider: Provider, pair: Scenario, device: torch.device, limit: int, deadline: Deadline | None
) -> Callable[[int], bool]:
    def fitting(tokens: int) -> bool:
        if deadline is not None and deadline.passed:
            raise TimeoutError
        return fits(provider, pair.with_tokens(tokens), device, limit)

    return fitting


def longest(fits: Callable[[int], bool]) -> int:
    """The largest number of positions that fits, by doubling and bisection; 0 where none does."""
    if not fits(_FIRST):
        return 0
    low = _FIRST
    while low < _MOST and fits(2 * low):
        low *= 2
    if low >= _MOST:
        return low
    step = low // 2
    for _ in range(_STEPS):
        if fits(low + step):
            low += step
        step //= 2
    return low


def fits(provider: Provider, scenario: Scenario, device: torch.device, limit: int) -> bool:
    """Whether one step's peak, inputs and gradients included, is within `limit` bytes."""
    if device.type == "cuda":
        return _fits_on_cuda(provider, scenario, device, limit)
    weight_bytes, hidden_bytes = _input_bytes(scenario)
    known = 2 * weight_bytes if scenario.trains == "head" else weight_bytes
    known += hidden_bytes * (1 + (scenario.trains != "forward") + provider.computes_reference)
    return known <= limit and known + extra.on_cpu(provider, scenario) <= limit


def _input_bytes(scenario: Scenario) -> tuple[int, int]:
    size, width = scenario.shape.hidden_size, DTYPES[scenario.dtype].itemsize
    return scenario.shape.vocab_size * size * width, scenario.tokens * size * width


def _fits_on_cuda(provider: Provider, scenario: Scenario, device: torch.device, limit: int) -> bool:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    try:
        inputs = make_inputs(scenario, device, with_reference=False)
        if not provider.computes_reference and scenario.reference == "given":
            inputs.ref_hidden = inputs.ref_hidden[:, :0]
        held = torch.cuda.memory_allocated(device) - before
        return held + peak_bytes(lambda: provider.step(inputs), device) <= limit
    except torch.OutOfMemoryError:
        return False


def parse_bytes(text: str) -> int:
    """Bytes of "16GiB", "800MiB" or a plain number.

    Raises:
        ValueError: for anything else.
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("", 1)):
        if text.endswith(unit):
            number = text.removesuffix(unit)
            try:
                return int(float(number) * size)
            except ValueError:
                break
    raise ValueError(f"a size should look like 16GiB, 800MiB or 1000000, got {text!r}")
