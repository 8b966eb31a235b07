"""python -m benchmarks.step: a whole DPO training step of a Hugging Face model.

The model is built from its configuration with random weights; prompt and completion lengths follow
a stated distribution (`benchmarks.step.data`). Every loop runs in a process of its own on the
same pairs: collation, policy forward and backward, reference forward (or its log-probabilities,
computed once before: that time is shown beside it), AdamW. Shown: pairs per second (the
first steps left out), the peak memory of the whole loop (on a CPU the process's resident set,
interpreter and libraries included), and whether the loss curves coincide.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_device, describe, environment
from benchmarks.measure import Deadline, quantiles
from benchmarks.report import documents, terminal
from benchmarks.step import data, loops, models, shown

WARMUP_STEPS = 2
_DEFAULTS = {
    # model, pairs per batch, steps, scale of the lengths
    "cpu": ("llama-36m", 4, 20, 0.5),
    "cuda": ("qwen2.5-0.5b", 8, 20, 1.0),
}


def run_loop(name: str, request: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """One row: the loop's process, its steps and its peak."""
    row: dict[str, Any] = {"provider": name, "summary": loops.LOOPS[name].summary, "status": "ok"}
    row |= {k: request[k] for k in ("model", "batch_size", "steps")}
    reason = loops.absent(name)
    if reason:
        return {**row, "status": "absent", "reason": reason}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step.worker", json.dumps(request)],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**row, "status": "skipped", "reason": "no time was left"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        return {**row, "status": "failed", "reason": last[:200]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    timed = result["seconds"][WARMUP_STEPS:]
    per_second = len(timed) / sum(timed)  # steps
    return {
        **row,
        "seconds": quantiles(timed),
        "pairs_per_second": request["batch_size"] * per_second,
        "tokens_per_second": _tokens(request) / len(timed) * per_second,
        "reference_seconds": result["reference_seconds"],
        "peak_bytes": result["peak_bytes"],
        "losses": result["losses"],
    }


def _tokens(request: dict[str, Any]) -> int:
    """Of the sequences of the steps that are timed, without padding: prompts twice."""
    lengths = data.Lengths(**request["lengths"])
    count = request["steps"] * request["batch_size"]
    examples = data.pairs(lengths, count, models.vocabulary(request["model"]))
    keys = ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
    timed = examples[WARMUP_STEPS * request["batch_size"] :]
    return sum(len(example[key]) for example in timed for key in keys)


def compare_speed(rows: list[dict[str, Any]]) -> None:
    """Each row's pairs per second, as a multiple of the faster of eager PyTorch and TRL."""
    found = {r["provider"]: r["pairs_per_second"] for r in rows if r["status"] == "ok"}
    baseline = max((found[name] for name in ("eager", "trl") if name in found), default=None)
    for r in rows:
        if baseline is not None and r["status"] == "ok":
            r["times_baseline"] = r["pairs_per_second"] / baseline


def compare_losses(rows: list[dict[str, Any]]) -> None:
    """Each row's largest difference of the loss from eager's curve."""
    eager = next((r["losses"] for r in rows if r["provider"] == "eager" and "losses" in r), None)
    for r in rows:
        if eager is not None and "losses" in r:
            pairs = zip(r["losses"], eager, strict=True)
            r["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--model", choices=models.SHAPES)
    parser.add_argument("--shape", choices=data.SHAPES, default="ultrafeedback-like")
    parser.add_argument("--length-scale", type=float, help="multiplies all lengths")
    parser.add_argument("--batch-size", type=int, help="pairs per step")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--loops", nargs="+", choices=loops.LOOPS, default=list(loops.LOOPS))
    parser.add_argument("--time-limit", type=float, help="seconds in all")
    parser.add_argument("--no-plots", action="store_true", help="write OUT.json alone")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    model, batch_size, steps, scale = _DEFAULTS[args.device.type]
    lengths = data.SHAPES[args.shape].scaled(args.length_scale or scale)
    request = {
        "model": args.model or model,
        "batch_size": args.batch_size or batch_size,
        "steps": args.steps or steps,
        "device": args.device.type,
        "lengths": lengths.as_dict(),
    }
    if request["steps"] <= WARMUP_STEPS:
        parser.error(f"--steps should be more than {WARMUP_STEPS}, which warm up")
    env, deadline = environment(args.device), Deadline(args.time_limit)
    terminal.hardware(env, describe(env))
    rows = []
    with terminal.progress(f"{request['model']}, {args.shape}", len(args.loops)) as tick:
        for name in args.loops:
            tick(name)
            timeout = None if args.time_limit is None else max(1.0, deadline.remaining)
            rows.append(run_loop(name, {**request, "loop": name}, timeout))
    compare_losses(rows)
    compare_speed(rows)
    drawn = data.statistics(data.pairs(lengths, request["steps"] * request["batch_size"], 1000))
    how = {
        "shape": args.shape,
        "lengths": {**lengths.as_dict(), **drawn},
        "warmup_steps": WARMUP_STEPS,
        "precision": "bf16 autocast, fp32 weights" if args.device.type == "cuda" else "fp32",
        "memory": "torch.cuda.max_memory_allocated of the process"
        if args.device.type == "cuda"
        else "VmHWM of the process, interpreter and libraries included",
    }
    shown.table(rows, how)
    doc = documents.document("step", "A whole training step", env, how, rows)
    if args.out:
        documents.save(doc, args.out.with_suffix(".json"))
        if not args.no_plots:
            shown.plot(doc, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
