"""python -m benchmarks.loss: the DPO loss step against every peer that runs on this machine.

A step is the policy's forward and backward into hidden states and lm_head (or hidden states alone
where the head is frozen, or no backward), from the same inputs for everybody; positions without
loss may be skipped by whoever can. Each provider must first be as accurate as eager PyTorch
(`accuracy.oracle`). Times are medians of interleaved rounds, shown also as multiples of the
floor: the units of the step times one bare matrix product, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_device, describe, environment
from benchmarks.loss import longest_pair, shown
from benchmarks.loss.runner import run_scenario
from benchmarks.measure import Deadline, Protocol
from benchmarks.memory import extra
from benchmarks.providers import by_name, registry
from benchmarks.report import documents, terminal
from benchmarks.scenarios import DTYPES, HEADS, REFERENCES, SUITES, TRAINS, Scenario

_PROTOCOLS = {
    "cuda": Protocol(warmup=3, min_rounds=5, max_rounds=50, seconds=0.4),
    "cpu": Protocol(warmup=1, min_rounds=3, max_rounds=7, seconds=2.0, settle=1),
}


# Seconds after which nothing is begun, where --time-limit says nothing: suites keep their word.
_TIME_LIMITS = {"quick": 110.0, "full": 570.0}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=__doc__.split("\n\n")[0]
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--suite", choices=SUITES, help="default: quick on a GPU, cpu without one")
    what.add_argument("--quick", action="store_true", help="the small suite of the device")
    what.add_argument("--head", choices=HEADS, help="one scenario, with the options below")
    made.add_argument("--tokens", type=int, nargs="+", default=[8192], help="of one scenario")
    made.add_argument("--share", type=float, default=0.5, help="of tokens that carry loss")
    made.add_argument("--trains", choices=TRAINS, default="head")
    made.add_argument("--dtype", choices=DTYPES, default="bf16")
    made.add_argument("--sequences", type=int, default=8)
    made.add_argument("--reference", choices=REFERENCES, default="given")
    made.add_argument("--flat", action="store_true", help="a nearly flat softmax")
    made.add_argument("--providers", nargs="+", help="only these (see --list)")
    made.add_argument("--list", action="store_true", help="list providers, and who is absent")
    made.add_argument("--find-max-tokens", metavar="SIZE", help="the longest pair within SIZE")
    made.add_argument(
        "--time-limit",
        type=float,
        help="seconds after which nothing is begun (default: 110 for --suite quick, 570 for full)",
    )
    made.add_argument("--no-memory", action="store_true", help="measure time alone")
    made.add_argument("--device", type=torch.device, default=default_device())
    made.add_argument("--out", type=Path, help="write OUT.json, OUT.png and OUT-tokens.png")
    made.add_argument("--no-plots", action="store_true", help="write OUT.json alone")
    made.add_argument("--append", action="store_true", help="add to OUT.json, of the same machine")
    return made


def scenarios(args: argparse.Namespace) -> list[Scenario]:
    if args.head:
        return [
            Scenario(
                args.head,
                tokens,
                args.share,
                args.trains,
                args.dtype,
                args.sequences,
                args.reference,
                peaked=not args.flat,
            )
            for tokens in args.tokens
        ]
    return SUITES[suite(args)]


def suite(args: argparse.Namespace) -> str:
    on_cpu = args.device.type == "cpu"
    small, usual = ("cpu-quick", "cpu") if on_cpu else ("quick", "quick")
    return args.suite or (small if args.quick else usual)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, show and save as it goes; returns the document."""
    protocol = _PROTOCOLS[args.device.type]
    usual = None if args.head else _TIME_LIMITS.get(suite(args))
    deadline = Deadline(usual if args.time_limit is None else args.time_limit)
    env = environment(args.device)
    how = {"memory": extra.METHOD[args.device.type], **protocol.as_dict()}
    terminal.hardware(env, describe(env))
    doc = documents.document("loss", "The DPO loss step", env, how, [])
    for scenario in scenarios(args):
        if deadline.passed:
            terminal.console.print(f"[yellow]no time left for {scenario.name}[/]")
            continue
        with terminal.progress(scenario.name) as tick:
            measured = run_scenario(
                scenario,
                args.device,
                protocol,
                args.providers,
                tick,
                deadline,
                not args.no_memory,
            )
        shown.table(scenario, measured)
        if any(r["status"] == "skipped" for r in measured) and deadline.passed:
            measured = [r for r in measured if r["status"] != "skipped"]
            if not any("seconds" in r for r in measured if r["provider"] != "products"):
                continue  # the bare products alone are no result
        doc["results"] += measured
        if args.out:  # after each scenario: a run that is cut off leaves what it has
            documents.save(doc, args.out.with_suffix(".json"), args.append)
    return doc


def find(args: argparse.Namespace) -> dict[str, Any]:
    limit = longest_pair.parse_bytes(args.find_max_tokens)
    deadline, env = Deadline(args.time_limit), environment(args.device)
    rows: list[dict[str, Any]] = []
    for scenario in scenarios(args)[:1]:
        with terminal.progress(scenario.name) as tick:
            rows += longest_pair.find_all(
                scenario, args.device, limit, args.providers, tick, deadline
            )
    shown.longest_pairs_table(rows, limit, describe(env))
    how = {"memory": extra.METHOD[args.device.type]}
    return documents.document("max_tokens", "The longest pair that fits", env, how, rows)


def main() -> None:
    args = parser().parse_args()
    warnings.filterwarnings("ignore", module="torch._inductor|torch._dynamo|torch.jit|triton")
    if args.list:
        shown.providers(registry(), args.device)
        return
    try:
        by_name(args.providers)
        doc = find(args) if args.find_max_tokens else run(args)
    except ValueError as error:
        parser().error(str(error))
    if args.out:
        documents.save(doc, args.out.with_suffix(".json"), args.append)
        if doc["kind"] == "loss" and not args.no_plots:
            shown.plot(documents.load(args.out.with_suffix(".json")), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
