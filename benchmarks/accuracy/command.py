"""python -m benchmarks.accuracy: how wrong each provider is, in nats, against fp64.

Sequences of growing length, one pair at a time, on a peaked softmax (as a trained model's) and a
nearly flat one. Per provider: the largest and the RMS error of log-probabilities per token and per
sequence, of the gradients relative to their size, and the margin when policy and reference are the
same (each provider computing both), which should be exactly 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import shown
from benchmarks.accuracy.oracle import Expected, accuracy_record, errors, oracle, oracle_dtype
from benchmarks.environment import default_device, describe, environment
from benchmarks.inputs import BETA, Inputs, make_inputs
from benchmarks.loss.runner import why_not
from benchmarks.measure import Deadline
from benchmarks.providers import BASELINES, FastDPO, Provider, by_name
from benchmarks.report import documents, terminal
from benchmarks.scenarios import DTYPES, HEADS, Scenario

LENGTHS = (512, 2048, 8192)
_DEFAULT_HEAD = {"cpu": "mistral-vocab-d256", "cuda": "llama-3-8b"}


def measure(
    scenario: Scenario,
    device: torch.device,
    names: list[str] | None = None,
    tick: Callable[[str], None] = lambda text: None,
    deadline: Deadline | None = None,
) -> list[dict[str, Any]]:
    """One row per provider on one pair."""
    torch.compiler.reset()
    inputs = make_inputs(scenario, device)
    tick("the oracle")
    expected = oracle(inputs, _dtype(inputs))
    baselines = {kind: provider.step(inputs) for kind, provider in BASELINES.items()}
    rows = []
    for provider in by_name(names):
        tick(provider.name)
        row: dict[str, Any] = {
            "provider": provider.name,
            "scenario": scenario.as_dict(),
            "oracle": str(_dtype(inputs)).removeprefix("torch."),
            "status": "ok",
        }
        excuse = why_not(provider, scenario, device)
        if excuse:
            row["status"], row["reason"] = excuse
        elif deadline is not None and deadline.passed:
            row["status"], row["reason"] = "skipped", "no time was left"
        else:
            try:
                row |= _one(provider, inputs, expected, baselines[provider.computes_reference])
            except Exception as error:  # whatever a peer raises is its result
                row["status"] = "failed"
                row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        rows.append(row)
    return rows


def _dtype(inputs: Inputs) -> torch.dtype:
    # fp64 wherever the tested dtype is not 16-bit: an fp32 oracle could not judge fp32.
    return torch.float64 if inputs.hidden.dtype == torch.float32 else oracle_dtype(inputs)


def _one(provider: Provider, inputs: Inputs, expected: Expected, eager: Expected) -> dict[str, Any]:
    got = provider.step(inputs)
    record = accuracy_record(got, expected, eager)
    found: dict[str, Any] = {"passes": record["passes"], "broken": record["broken"]}
    absolute = errors(got, expected)
    found["sequence_nats"] = _finite(absolute["logps"])
    found["token_nats"] = token_errors(provider, got, expected, inputs)
    for name in ("hidden", "weight"):
        truth = getattr(expected, name)
        if truth is None:
            continue
        size = {"max": truth.abs().max(), "rms": truth.square().mean().sqrt()}
        found[f"{name}_relative"] = _finite(
            {norm: absolute[name][norm] / float(size[norm]) for norm in size}
        )
    found["margin_at_initialisation"] = margin_at_initialisation(provider, inputs)
    return found


def token_errors(
    provider: Provider, got: Expected, expected: Expected, inputs: Inputs
) -> dict[str, Any] | None:
    """Errors of log-probabilities token by token; None for providers that return sums alone."""
    tokens = got.token_logps
    if tokens is None and isinstance(provider, FastDPO):
        tokens = provider.token_logps(inputs)
    if tokens is None:
        return None
    difference = (tokens.to(expected.token_logps.dtype) - expected.token_logps)[inputs.mask]
    return _finite(
        {
            "max": float(difference.abs().max()),
            "rms": float(difference.square().mean().sqrt()),
            "mean": float(difference.mean()),
        }
    )


def margin_at_initialisation(provider: Provider, inputs: Inputs) -> float | None:
    """The largest |margin| when the reference is the policy; exactly 0 where both go through the
    same operations.

    A provider of log-probabilities or of the whole loss computes the reference itself here. The
    policy's pass is one with gradients, as in training.
    """
    same = replace(
        inputs,
        scenario=replace(inputs.scenario, reference="forward"),
        ref_hidden=inputs.hidden.detach(),
        ref_weight=inputs.weight.detach(),
    )
    policy = provider.step(same).logps
    evaluation = replace(
        same, hidden=inputs.hidden.detach(), weight=inputs.weight.detach()
    )  # the reference's pass: nothing requires a gradient
    reference = provider.step(evaluation).logps
    chosen, rejected = (BETA * (policy - reference)).double().chunk(2)
    return documents.finite(float((chosen - rejected).abs().max()))


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: documents.finite(value) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--head", choices=HEADS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--trains", choices=("head", "frozen"), default="head")
    parser.add_argument("--providers", nargs="+")
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing is begun")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--no-plots", action="store_true", help="write OUT.json alone")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    env, deadline = environment(args.device), Deadline(args.time_limit)
    terminal.hardware(env, describe(env))
    head = args.head or _DEFAULT_HEAD[args.device.type]
    doc = documents.document("accuracy", "Errors against fp64", env, {"beta": BETA}, [])
    for length in args.lengths:
        for peaked in (True, False):
            scenario = Scenario(
                head, 2 * length, 1.0, args.trains, args.dtype, sequences=2, peaked=peaked
            )
            if deadline.passed:
                terminal.console.print(f"[yellow]no time left for {scenario.name}[/]")
                continue
            with terminal.progress(scenario.name) as tick:
                measured = measure(scenario, args.device, args.providers, tick, deadline)
            shown.table(scenario, measured)
            doc["results"] += measured
            if args.out:  # a run that is cut off leaves what it has
                documents.save(doc, args.out.with_suffix(".json"))
    if args.out and doc["results"] and not args.no_plots:
        shown.plot(doc, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
