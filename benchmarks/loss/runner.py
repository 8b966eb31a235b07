"""One scenario: who can run, who is right, how long each takes and how much memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.accuracy.oracle import accuracy_record, oracle, oracle_dtype
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.loss.floor import products
from benchmarks.measure import Deadline, Protocol, Step, interleaved, quantiles
from benchmarks.memory import extra
from benchmarks.providers import BASELINES, Provider, by_name
from benchmarks.report.documents import finite
from benchmarks.scenarios import Scenario

# Accuracy is checked on a batch of at most this many positions, with the scenario's head.
CHECK_TOKENS = {"cpu": 1024, "cuda": 2048}
_ROTATED = 2  # batches that rounds alternate between

Tick = Callable[[str], None]


def run_scenario(
    scenario: Scenario,
    device: torch.device,
    protocol: Protocol,
    names: list[str] | None = None,
    tick: Tick = lambda text: None,
    deadline: Deadline | None = None,
    with_memory: bool = True,
) -> list[dict[str, Any]]:
    """One row per provider, the bare products first; see `benchmarks.report.documents`."""
    deadline = deadline or Deadline(None)
    torch.compiler.reset()  # its limit of recompilations is per process, and scenarios are many
    first = make_inputs(scenario, device)
    batches = [first] + [
        make_inputs(scenario, device, seed, weight=first.weight) for seed in range(1, _ROTATED)
    ]
    everyone = by_name(names)
    rows = {p.name: _begin(p, scenario, device) for p in everyone}
    able = [p for p in everyone if rows[p.name]["status"] == "ok"]
    _check(able, rows, first, tick, deadline)
    for provider in _still(able, rows):
        tick(f"{provider.name}: first run")
        _attempt(rows[provider.name], deadline, lambda p=provider: p.step(first))

    timed = _still(able, rows)
    bare = products(batches)
    steps = {p.name: _rotating(p, batches) for p in timed}

    def failed(name: str, error: Exception) -> None:
        if name not in rows:  # the bare products
            raise error
        _fail(rows[name], error)

    taken = interleaved({**bare, **steps}, device, protocol, tick, deadline, failed)
    floor = _floor_row(scenario, {name: taken[name] for name in bare})
    del bare, steps, batches
    for provider in _still(timed, rows):
        row = rows[provider.name]
        row["seconds"] = quantiles(taken[provider.name])
        _set_multiples(row, scenario, provider, floor["t1_seconds"])
        if with_memory and not deadline.passed:  # without it a row is still a result
            tick(f"{provider.name}: memory")
            _attempt(
                row,
                deadline,
                lambda r=row, p=provider: r.update(extra_bytes=extra.extra_bytes(p, first)),
            )
    return [floor, *rows.values()]


def why_not(provider: Provider, scenario: Scenario, device: torch.device) -> tuple[str, str] | None:
    """(status, reason) of a provider that does not take part; None for one that does."""
    reason = provider.absent(device)
    if reason:
        return "absent", reason
    reason = provider.refuses(scenario)
    return ("refused", reason) if reason else None


def _rotating(provider: Provider, batches: list[Inputs]) -> Step:
    return lambda i: provider.step(batches[i % len(batches)])


def _begin(provider: Provider, scenario: Scenario, device: torch.device) -> dict[str, Any]:
    row = {
        "provider": provider.name,
        "summary": provider.summary,
        "scenario": scenario.as_dict(),
        "status": "ok",
    }
    excuse = why_not(provider, scenario, device)
    if excuse:
        row["status"], row["reason"] = excuse
    return row


def _still(providers: list[Provider], rows: dict[str, dict[str, Any]]) -> list[Provider]:
    return [p for p in providers if rows[p.name]["status"] == "ok"]


def _check(
    providers: list[Provider],
    rows: dict[str, dict[str, Any]],
    inputs: Inputs,
    tick: Tick,
    deadline: Deadline,
) -> None:
    """The rule of accuracy, before anything is timed."""
    scenario = inputs.scenario
    most = CHECK_TOKENS["cuda" if inputs.hidden.is_cuda else "cpu"]
    if scenario.tokens > most:
        length = max(1, most // scenario.sequences)
        smaller = replace(scenario, tokens=length * scenario.sequences)
        inputs = make_inputs(smaller, inputs.hidden.device, weight=inputs.weight)
    tick("the oracle")
    expected = oracle(inputs)
    baselines = {
        kind: BASELINES[kind].step(inputs) for kind in {p.computes_reference for p in providers}
    }
    for provider in providers:
        tick(f"{provider.name}: accuracy")
        row = rows[provider.name]

        def check(p: Provider = provider, r: dict[str, Any] = row) -> None:
            record = accuracy_record(p.step(inputs), expected, baselines[p.computes_reference])
            r["accuracy"] = {
                "tokens": inputs.scenario.tokens,
                "oracle": str(oracle_dtype(inputs)).removeprefix("torch."),
                "passes": record["passes"],
                **{
                    key: {q: {n: finite(e) for n, e in errs.items()} for q, errs in value.items()}
                    for key, value in record.items()
                    if key in ("errors", "eager_errors")
                },
            }
            if not record["passes"]:
                r["status"], r["reason"] = "inaccurate", "; ".join(record["broken"])

        _attempt(row, deadline, check)


def _attempt(row: dict[str, Any], deadline: Deadline, action: Callable[[], Any]) -> None:
    """Run one provider's action; what it raises becomes its row's reason."""
    if deadline.passed:
        row["status"], row["reason"] = "skipped", "no time was left"
        return
    try:
        action()
    except Exception as error:  # whatever a peer raises is its result
        _fail(row, error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fail(row: dict[str, Any], error: Exception) -> None:
    row["status"], row["reason"] = "failed", failure(error)
    row.pop("seconds", None)


def failure(error: Exception) -> str:
    """What a provider raised, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _floor_row(scenario: Scenario, taken: dict[str, list[float]]) -> dict[str, Any]:
    extra_forward = int(scenario.reference == "forward")
    whole = [sum(parts) + extra_forward * parts[0] for parts in zip(*taken.values(), strict=True)]
    t1 = quantiles(taken["t1"])["median"]
    seconds = quantiles(whole)
    return {
        "provider": "products",
        "summary": "the bare matrix products of the step, nothing else",
        "scenario": scenario.as_dict(),
        "status": "ok",
        "seconds": seconds,
        "t1_seconds": t1,
        "multiple_of_floor": seconds["median"] / (scenario.units * t1),
    }


def _set_multiples(row: dict[str, Any], scenario: Scenario, provider: Provider, t1: float) -> None:
    given = scenario.reference == "given"
    row["units"] = scenario.units + int(provider.computes_reference and given)
    row["t1_seconds"] = t1
    row["multiple_of_floor"] = row["seconds"]["median"] / (scenario.units * t1)
