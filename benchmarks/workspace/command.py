"""python -m benchmarks.workspace: time and extra memory against `workspace_bytes`, beside eager.

A trained lm_head needs g = ∂loss/∂logp before its gradient's product, so E is kept for as many
columns of the vocabulary as the workspace holds, and computed again for the others. This draws what
a byte of it buys, and says whether promises are kept: the default takes at most a quarter of
eager's extra memory and four thirds of its time, a workspace of 0 at most a tenth of the memory,
and one for all of E no more than its time.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_device, describe, environment
from benchmarks.inputs import make_inputs
from benchmarks.loss.floor import products
from benchmarks.measure import Protocol, interleaved, quantiles
from benchmarks.memory import extra
from benchmarks.providers import BASELINES, EVERYTHING, FastDPO, Provider
from benchmarks.report import documents, terminal
from benchmarks.scenarios import DTYPES, HEADS, Scenario
from benchmarks.workspace import shown
from benchmarks.workspace.limits import promises

FRACTIONS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def contenders(scenario: Scenario, fractions: tuple[float, ...]) -> list[Provider]:
    """Eager, the default, and a workspace for each share of E."""
    everything = scenario.loss_tokens * scenario.shape.vocab_size * DTYPES[scenario.dtype].itemsize
    found: list[Provider] = [BASELINES[False], FastDPO("default", "its default", None, None)]
    for share in fractions:
        workspace = EVERYTHING if share == 1 else int(share * everything)
        found.append(FastDPO(f"{share:.3g} of E", "", None, workspace))
    return found


def measure(
    scenario: Scenario,
    device: torch.device,
    protocol: Protocol,
    fractions: tuple[float, ...] = FRACTIONS,
    tick: Any = lambda text: None,
) -> list[dict[str, Any]]:
    """One row per contender: seconds, their multiple of the floor, extra bytes."""
    inputs = make_inputs(scenario, device)
    everyone = contenders(scenario, fractions)
    steps = {p.name: lambda i, p=p: p.step(inputs) for p in everyone}
    taken = interleaved({**products([inputs]), **steps}, device, protocol, tick)
    t1 = quantiles(taken["t1"])["median"]
    rows = []
    for provider in everyone:
        tick(f"memory of {provider.name}")
        seconds = quantiles(taken[provider.name])
        workspace = provider.workspace if isinstance(provider, FastDPO) else None
        rows.append(
            {
                "provider": provider.name,
                "status": "ok",
                "scenario": scenario.as_dict(),
                "workspace_bytes": None if workspace == EVERYTHING else workspace,
                "seconds": seconds,
                "t1_seconds": t1,
                "multiple_of_floor": seconds["median"] / (scenario.units * t1),
                "extra_bytes": extra.extra_bytes(provider, inputs),
            }
        )
    return rows


def save_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            (
                *("dtype", "provider", "workspace_bytes", "seconds", "seconds_p20", "seconds_p80"),
                *("multiple_of_floor", "extra_bytes"),
            )
        )
        for r in rows:
            s = r["seconds"]
            writer.writerow(
                [
                    r["scenario"]["dtype"],
                    r["provider"],
                    r["workspace_bytes"],
                    *(f"{s[q]:.6g}" for q in ("median", "p20", "p80")),
                    f"{r['multiple_of_floor']:.4g}",
                    r["extra_bytes"],
                ]
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.workspace", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--head", choices=HEADS, default="llama-3-vocab-d896")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing at least")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument(
        "--out", type=Path, help="write OUT.json, OUT.csv and OUT.png (no suffix here)"
    )
    parser.add_argument("--append", action="store_true", help="add to OUT.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    protocol = Protocol(
        warmup=0 if args.device.type == "cpu" else 3,  # on a CPU, settling warms up
        min_rounds=args.rounds,
        max_rounds=args.rounds,
        settle=int(args.device.type == "cpu"),
    )
    env = environment(args.device)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        scenario = Scenario(args.head, args.tokens, dtype=dtype)
        with terminal.progress(scenario.name) as tick:
            measured = measure(scenario, args.device, protocol, tick=tick)
        rows += measured
        shown.table(scenario, measured, promises(measured), describe(env))
    how = {"memory": extra.METHOD[args.device.type], **protocol.as_dict()}
    doc = documents.document("workspace", "Time and memory against the workspace", env, how, rows)
    if args.out:
        doc = documents.save(doc, args.out.with_suffix(".json"), args.append)
        save_csv(doc["results"], args.out.with_suffix(".csv"))
        shown.plot(doc, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
