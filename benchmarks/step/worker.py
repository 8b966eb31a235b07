"""One loop in a process of its own, so that allocator, peak memory and caches are its own."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from benchmarks.step import data, models
from benchmarks.step.loops import LOOPS, Job


def run(request: dict) -> dict:
    """Losses, seconds of every step and the peak memory of the whole loop."""
    device = torch.device(request["device"])
    lengths = data.Lengths(**request["lengths"])
    examples = data.pairs(
        lengths, request["steps"] * request["batch_size"], models.vocabulary(request["model"])
    )
    job = Job(request["model"], examples, request["batch_size"], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    done = LOOPS[request["loop"]].run(job)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(s.split()[1]) * 1024 for s in status if s.startswith("VmHWM:"))
    return {
        "losses": done.losses,
        "seconds": done.seconds,
        "reference_seconds": done.reference_seconds,
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="One training loop (internal).")
    parser.add_argument("request", help="JSON: loop, model, lengths, batch_size, steps, device")
    request = json.loads(parser.parse_args().request)
    with redirect_stdout(sys.stderr):  # trainers print; the last line of stdout is ours
        result = run(request)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
