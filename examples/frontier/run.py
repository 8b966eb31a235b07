"""The whole study: python examples/frontier/run.py [--jobs N] [--trl]

Runs `fastdpo demo --frontier --full` into out/ beside this file (resumed if it was interrupted),
and copies its records and figures here, where they are committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

from fastdpo.demo.frontier import command
from fastdpo.demo.frontier.plan import trl_plan

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--trl", action="store_true", help="with what needs TRL")
    options = parser.parse_args()
    out, jobs = HERE / "out", str(options.jobs)
    asked = command.read(["--frontier", "--full", "--jobs", jobs, "--output", str(out)])
    if options.trl:
        asked = dataclasses.replace(asked, plan=(*asked.plan, *trl_plan()))
    command.run(asked)
    shutil.copy2(out / "results.json", HERE)
    shutil.copytree(out / "figures", HERE / "figures", dirs_exist_ok=True)
