"""python -m benchmarks.kernels --static: what compiling the Triton kernels gives, without a GPU.

    python -m benchmarks.kernels --static                     the essential variants
    python -m benchmarks.kernels --static --all --arch sm_90  every shipped one, of one architecture
    python -m benchmarks.kernels --static --arch sm_90 --write    the table of docs/kernels.md

Registers, spills, shared memory, and tensor-core and bulk-copy instructions are read from the
binaries that Triton compiles for each architecture. The last column is the time that one launch
takes on an H200 at least, by a model (`traffic`), for 4,096 rows (64 where they are few) of a
head of 128,256 × 4,096, in 64 sequences, none of whose labels is too unlikely for its anchor.
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

from benchmarks.kernels import traffic
from benchmarks.kernels.traffic import Work
from benchmarks.report import command as report
from benchmarks.report import terminal

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
_MODULE = "benchmarks.instruments.ahead_of_time"
_H200 = "sm_90"
_PROCESSORS = 132
_N, _FEW, _V, _D, _SEQUENCES = 4096, 64, 128256, 4096, 64
_STATS = {"entropy", "log_sum_sq_probs", "mean_logits", "is_top1"}
_LAST = "at least, by a model of an H200"
PAGE = report.ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- static:begin -->", "<!-- static:end -->"
# The page's rows: kernel, called as, what that is.
_ROWS = (
    ("exp_logits_tma", "half+out", "with E"),
    ("exp_logits_tma", "half", "without E"),
    ("exp_logits_tma", "half+out+softcap", "with E and softcap"),
    ("exp_logits_pointers", "half+out+unaligned", "rows at any address"),
    ("exp_logits_reanchored", "half+out", "no row flagged"),
    ("reduce_sums", "half+out", ""),
    ("target_logits_kernel", "bfloat16", ""),
    ("logits_logps_kernel", "bfloat16", ""),
    ("logits_logps_backward_kernel", "bfloat16", ""),
    ("sequence_loss_kernel", "bfloat16", ""),
)


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


def predicted(row: dict[str, Any]) -> Work:
    """What the launch must move, multiply and issue."""
    first, *flags = row["variant"].split("+")
    size = 2 if first in ("half", "bfloat16") else 4
    n = _FEW if "few" in flags else _N
    kernel = row["kernel"]
    if kernel in ("exp_logits_tma", "exp_logits_pointers"):
        rows, columns, _ = map(int, row["tile"].split("×"))
        return traffic.exp_logits(
            n,
            _V,
            _D,
            size,
            first,
            kept=_V if "out" in flags else 0,
            tile=(rows, columns, row["group"]),
            softcap="softcap" in flags,
        )
    if kernel == "exp_logits_reanchored":
        return traffic.nothing_reanchored(n, _PROCESSORS)
    if kernel == "reduce_sums":
        if row["again"]:
            return traffic.nothing_reanchored(n)
        return traffic.reduce_sums(n, row["column_tiles"], 1 + len(_STATS & set(flags)))
    if kernel == "settle_ties":  # no row is close
        return traffic.target_logits(n, _D, size)
    return {
        "target_logits_kernel": traffic.target_logits(_N, _D, size),
        "logits_logps_kernel": traffic.logits_logps(_N, _V, size),
        "logits_logps_backward_kernel": traffic.logits_logps_backward(_N, _V, size),
        "sequence_loss_kernel": traffic.sequence_loss(_N, _SEQUENCES),
    }[kernel]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/kernels.md, from the rows of sm_90."""
    lines = [
        f"| kernel, bf16 | tile | registers | spills | shared memory | HGMMA | TMA loads / stores "
        f"| {_LAST} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kernel, variant, what in _ROWS:
        # The second of those that do something for flagged rows: the first finds maxima.
        row = [
            r
            for r in rows
            if (r["kernel"], r["variant"]) == (kernel, variant)
            and (kernel == "exp_logits_reanchored" or not r["again"])
        ][-1]
        name = f"`{kernel.removesuffix('_kernel')}`"
        cells = (
            f"{name}, {what}" if what else name,
            row["tile"] or "–",
            row["registers"],
            row["spills"],
            terminal.amount(row["shared"]),
            row["tensor_cores"] or "–",
            f"{row['bulk_loads']} / {row['bulk_stores']}" if row["bulk_loads"] else "–",
            _brief(predicted(row).seconds),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def in_page(text: str, section: str) -> str:
    """The page's text with the table between its markers."""
    return report.with_section(text, section, BEGIN, END)


def _brief(seconds: float) -> str:
    for unit, size in (("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return "below 1 µs"


def show(rows: list[dict[str, Any]], arch: str) -> None:
    table = Table(title=f"compiled for {arch}")
    for name in ("kernel", "called as", "tile"):
        table.add_column(name)
    for name in (
        "warps", "stages", "registers", "spills", "shared", "tensor cores", "bulk in/out",
        "instructions", "H200, at least",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["kernel"].removesuffix("_kernel"),
            row["variant"].replace("+", " "),
            row["tile"],
            str(row["warps"]),
            str(row["stages"]),
            str(row["registers"]),
            f"[red]{row['spills']}[/]" if row["spills"] else "0",
            terminal.amount(row["shared"]),
            str(row["tensor_cores"] or "–"),
            f"{row['bulk_loads']}/{row['bulk_stores']}" if row["bulk_loads"] else "–",
            f"{row['instructions']:,}",
            _brief(predicted(row).seconds) if arch == _H200 else "–",
        )
    terminal.console.print(table)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels --static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="every shipped variant")
    parser.add_argument("--rows", type=Path, help="also write the rows, as JSON, here")
    parser.add_argument("--write", action="store_true", help="also write docs/kernels.md's table")
    options = parser.parse_args(arguments)
    if options.write and _H200 not in options.arch:
        parser.error(f"docs/kernels.md has the table of {_H200}")
    found: list[dict[str, Any]] = []
    for arch in options.arch:
        rows = list(compiled([arch], options.all))
        show(rows, arch)
        found += rows
        if options.rows:
            options.rows.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if options.write:
        section = markdown([row for row in found if row["arch"] == _H200])
        PAGE.write_text(in_page(PAGE.read_text(), section))
    terminal.console.print(f"The last column models an {traffic.H200}.")
    return 0
