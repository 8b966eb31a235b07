"""python -m benchmarks.kernels --static: what compiling the Triton kernels gives, without a GPU.

    python -m benchmarks.kernels --static                     the essential variants
    python -m benchmarks.kernels --static --all --arch sm_90  every shipped one, of one architecture

Registers, spills, shared memory, and tensor-core and bulk-copy instructions are read from the
binaries that Triton compiles for each architecture. The last column is the traffic model's time of
one launch on an H200 (`kernels_model`), for 4,096 rows (64 where they are few) of a head of
128,256 × 4,096.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import kernels_model, tables
from benchmarks.kernels_model import Work

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
_MODULE = "fastdpo.backends.triton.ahead"
_H200 = "sm_90"
_N, _FEW, _V, _D = 4096, 64, 128256, 4096


def compiled(archs: Iterable[str], thorough: bool) -> Iterator[dict[str, Any]]:
    """One row per kernel, as it is compiled, by a process in which Triton does not interpret."""
    command = [sys.executable, "-m", _MODULE, "--arch", *archs, *(["--all"] if thorough else [])]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"{_MODULE} ended with status {process.returncode}")


def predicted(row: dict[str, Any]) -> Work | None:
    """What the launch must move and multiply, where its shapes alone decide that."""
    first, *flags = row["variant"].split("+")
    size = 2 if first in ("half", "bfloat16") else 4
    if row["kernel"] in ("exp_logits_tma", "exp_logits_pointers"):
        rows, columns, _ = map(int, row["tile"].split("×"))
        return kernels_model.exp_logits(
            _FEW if "few" in flags else _N,
            _V,
            _D,
            size,
            first,
            kept=_V if "out" in flags else 0,
            tile=(rows, columns, row["group"]),
        )
    return {
        "target_logits_kernel": kernels_model.target_logits(_N, _D, size),
        "logits_logps_kernel": kernels_model.logits_logps(_N, _V, size),
        "logits_logps_backward_kernel": kernels_model.logits_logps_backward(_N, _V, size),
    }.get(row["kernel"])


def show(rows: list[dict[str, Any]], arch: str) -> None:
    table = Table(title=f"compiled for {arch}")
    for name in ("kernel", "called as", "tile"):
        table.add_column(name)
    for name in (
        "warps", "stages", "registers", "spills", "shared", "tensor cores", "bulk in/out",
        "instructions", "H200 model",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        work = predicted(row) if arch == _H200 else None
        table.add_row(
            row["kernel"].removesuffix("_kernel"),
            row["variant"].replace("+", " "),
            row["tile"],
            str(row["warps"]),
            str(row["stages"]),
            str(row["registers"]),
            f"[red]{row['spills']}[/]" if row["spills"] else "0",
            tables.amount(row["shared"]),
            str(row["tensor_cores"] or "–"),
            f"{row['bulk_loads']}/{row['bulk_stores']}" if row["bulk_loads"] else "–",
            f"{row['instructions']:,}",
            "–" if work is None else tables.duration(work.seconds),
        )
    tables.console.print(table)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels --static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="every shipped variant")
    parser.add_argument("--rows", type=Path, help="also write the rows, as JSON, here")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    for arch in options.arch:
        rows = list(compiled([arch], options.all))
        show(rows, arch)
        found += rows
        if options.rows:
            options.rows.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    tables.console.print(f"The last column models an {kernels_model.H200}.")
    return 0
