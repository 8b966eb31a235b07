"""python -m benchmarks.kernels: each primitive of every backend against its floor, on a GPU.

    python -m benchmarks.kernels --quick         one shape
    python -m benchmarks.kernels --out kernels   also write kernels.json
    python -m benchmarks.kernels --static        what compiling the Triton kernels gives, no GPU

A product's floor is the vendor's product of the same shape, that of everything else a device copy
of as many bytes; "of it" is the share of that rate which is reached. Logits that exist are also
given to eager PyTorch and to torch.compile. Beside each measured time stands what the traffic model
says of an H200. Without a GPU nothing is timed, and the static table is printed instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_device, describe, environment
from benchmarks.kernels import traffic
from benchmarks.kernels.comparison import Comparison, Shape
from benchmarks.kernels.primitives import comparisons
from benchmarks.kernels.shown import table as show
from benchmarks.loss.runner import failure
from benchmarks.measure import Deadline, Protocol, interleaved, quantiles
from benchmarks.report import documents, terminal

SUITES = {
    "quick": (Shape("llama-3-8b", 4096),),
    "full": (
        Shape("llama-3-8b", 4096),
        Shape("gemma-2-2b", 4096),
        Shape("gpt2", 8192),
        Shape("llama-3-8b", 64),
        Shape("mistral-7b", 4096, torch.float32),
        Shape("qwen2.5-7b", 8192),
    ),
    "tiny": (Shape("tiny", 40), Shape("tiny-softcap", 40, torch.float32)),
}
_PROTOCOL = Protocol(warmup=3, min_rounds=10, max_rounds=50, seconds=0.4)
_FLOOR = "floor"


def measure(
    comparison: Comparison, device: torch.device, protocol: Protocol
) -> list[dict[str, Any]]:
    """One row per backend."""
    row = {
        "primitive": comparison.name,
        "scenario": {"name": _title(comparison), **comparison.shape},
    }
    rows: list[dict[str, Any]] = []

    def failed(name: str, error: Exception) -> None:
        if name == _FLOOR:
            raise error
        rows.append({"provider": name, "status": "failed", "reason": failure(error), **row})

    steps = {_FLOOR: comparison.floor, **comparison.steps}
    taken = interleaved(steps, device, protocol, failed=failed)
    floor = quantiles(taken.pop(_FLOOR))
    for name in taken:
        seconds = quantiles(taken[name])
        rows.append(
            {
                "provider": name,
                "status": "ok",
                **row,
                "seconds": seconds,
                "floor_is": comparison.floor_is,
                "floor_seconds": floor,
                "multiple_of_floor": seconds["median"] / floor["median"],
                "bound": comparison.work.bound,
                "tera_operations_per_second": comparison.work.operations / seconds["median"] / 1e12,
                "tera_bytes_per_second": comparison.work.bytes / seconds["median"] / 1e12,
                "predicted_seconds_h200": comparison.work.seconds,
            }
        )
    for name, reason in comparison.absent.items():
        rows.append({"provider": name, "status": "absent", "reason": reason, **row})
    return rows


def run(args: argparse.Namespace) -> None:
    """Measure, show and save as it goes."""
    deadline = Deadline(args.time_limit)
    env = environment(args.device)
    terminal.hardware(env, describe(env))
    how = {**_PROTOCOL.as_dict(), "model": traffic.H200}
    tuned = os.environ.get("FASTDPO_AUTOTUNE") == "1"
    title = "The primitives against their floors" + ", with tiles that autotuning found" * tuned
    doc = documents.document("kernels", title, env, how, [])
    for shape in SUITES["quick" if args.quick else args.suite]:
        measured: list[dict[str, Any]] = []
        for comparison in () if deadline.passed else comparisons(shape, args.device):
            if args.primitives and comparison.name not in args.primitives:
                continue
            measured += measure(comparison, args.device, _PROTOCOL)
            if args.out:  # after each comparison: a run that is cut off leaves what it has
                so_far = {**doc, "results": doc["results"] + measured}
                documents.save(so_far, args.out.with_suffix(".json"))
            if deadline.passed:
                break
        if not measured:
            terminal.console.print(f"[yellow]no time left for {shape}[/]")
            continue
        show(measured, _caption(measured[0]["scenario"]))
        doc["results"] += measured


def _title(comparison: Comparison) -> str:
    return f"{comparison.name} {_caption(comparison.shape)}"


def _caption(shape: dict[str, Any]) -> str:
    curve = f", softcap {shape['softcap']:g}" if shape["softcap"] else ""
    sizes = f"N {shape['N']:,}, V {shape['V']:,}, D {shape['D']:,}"
    return f"{shape['head']} · {sizes}, {shape['dtype']}{curve}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=SUITES, default="full")
    parser.add_argument("--primitives", nargs="+", help="only these, by the names in the table")
    parser.add_argument("--quick", action="store_true", help="the suite of one shape")
    parser.add_argument("--static", action="store_true", help="compile, and time nothing")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing is begun")
    parser.add_argument("--out", "--json", type=Path, help="write OUT.json")
    args, rest = parser.parse_known_args()
    if args.static or (args.device.type == "cpu" and args.suite != "tiny"):
        if not args.static:
            terminal.console.print("There is no GPU here: nothing is timed.")
        from benchmarks.kernels import compiled

        return compiled.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
