"""Primitives beside their floors, in the terminal and in docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.report.markdown import line, source
from benchmarks.report.terminal import console, duration


def table(rows: list[dict[str, Any]], title: str) -> None:
    shown = Table(title=title)
    shown.add_column("primitive")
    columns = ("backend", "time", "20% – 80%", "floor", "× floor", "of it", "reaches", "H200 model")
    for name in columns:
        shown.add_column(name, justify="left" if name == "backend" else "right")
    for r in (r for r in rows if r["status"] == "ok"):
        products = r["bound"] == "products"
        reached = r["tera_operations_per_second" if products else "tera_bytes_per_second"]
        shown.add_row(
            r["primitive"],
            r["provider"],
            _brief(r["seconds"]["median"]),
            f"{_brief(r['seconds']['p20'])} – {_brief(r['seconds']['p80'])}",
            _brief(r["floor_seconds"]["median"]),
            f"{r['multiple_of_floor']:.2f}",
            f"{1 / r['multiple_of_floor']:.0%}",
            f"{reached:.3g} {'TFLOP/s' if products else 'TB/s'}",
            _brief(r["predicted_seconds_h200"]),
        )
    console.print(shown)
    for r in (r for r in rows if r["status"] != "ok"):
        where = "is absent from" if r["status"] == "absent" else "failed in"
        console.print(f"  {r['provider']} {where} {r['primitive']}: {r['reason']}")


def markdown(doc: dict[str, Any]) -> str:
    lines = [
        "**Each primitive** against its floor: the vendor's product of the same shape, or a device "
        "copy of as many bytes. " + source(doc),
        "",
        line("primitive and shape", "backend", "time", "× floor", "of it", "reaches", "bound by"),
        line("---", "---", "---:", "---:", "---:", "---:", "---"),
    ]
    for r in doc["results"]:
        if r["status"] != "ok":
            continue
        products = r["bound"] == "products"
        rate = r["tera_operations_per_second" if products else "tera_bytes_per_second"]
        reached = f"{rate:.3g} {'TFLOP/s' if products else 'TB/s'}"
        multiple = r["multiple_of_floor"]
        cells = duration(r["seconds"]["median"]), f"{multiple:.2f}", f"{1 / multiple:.0%}", reached
        lines.append(line(r["scenario"]["name"], f"`{r['provider']}`", *cells, r["bound"]))
    return "\n".join(lines)


def _brief(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else duration(seconds)
