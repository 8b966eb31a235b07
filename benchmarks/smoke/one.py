"""python -m benchmarks.smoke.one NAME: one check, in a process that a bad kernel may take with it.

The last line of its output is JSON. It ends by itself a little after its time, even where it hangs
on the device and nobody is left to end it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import sys
import time
from typing import Any

import torch

from benchmarks.measure import synchronize
from benchmarks.report.documents import finite
from benchmarks.smoke import table
from benchmarks.smoke.process import ASK, GRACE, failed


def answer(name: str, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        found = table.CHECKS[name].run(table.Place.on(device))
        synchronize(device)  # what a kernel did wrong may show only here
    except table.Absent as absent:
        return {"verdict": "absent", "words": str(absent)}
    except Exception as error:
        return failed(error)
    return {
        "verdict": "ok" if found.worst <= 1.0 else "WRONG",
        "words": str(found),
        "error_over_allowed": finite(found.worst),
        "errors": [{**e._asdict(), "size": finite(e.size)} for e in found.errors],
        **found.details,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke.one")
    parser.add_argument("name")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--until", type=float, required=True, help="of the monotonic clock")
    parser.add_argument("--checks-from", nargs="*", default=[])
    args = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(ASK, all_threads=False)
    signal.alarm(max(0, int(args.until - time.monotonic())) + GRACE)
    table.load(args.checks_from)
    row = answer(args.name, args.device)
    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
