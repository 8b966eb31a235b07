"""The counted memory of a step in the terminal, in docs/benchmarks.md and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.report.markdown import by_scenario, commits, line
from benchmarks.report.plotting import OURS, plt, save
from benchmarks.report.terminal import amount, console


def table(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["provider"] for r in rows))
    table = Table(title="Memory of a step, counted on tensors without data: nothing was measured")
    table.add_column("scenario")
    for name in names:
        table.add_column(name, justify="right")
    for scenario in dict.fromkeys(r["scenario"]["name"] for r in rows):
        mine = {r["provider"]: r for r in rows if r["scenario"]["name"] == scenario}
        table.add_row(
            scenario,
            *(
                amount(mine[n]["extra_bytes"]) if mine[n]["status"] == "ok" else mine[n]["status"]
                for n in names
            ),
        )
    console.print(table)
    reasons = {r["provider"]: r["reason"] for r in rows if r["status"] not in ("ok", "refused")}
    for name, reason in reasons.items():
        console.print(f"  {name}: {reason}")


def markdown(doc: dict[str, Any]) -> str:
    columns = [r["provider"] for r in doc["results"] if r["status"] != "absent"]
    columns = list(dict.fromkeys(columns))
    lines = [
        "**Memory of a step** beyond inputs and gradients: allocations of the GPU's code path, "
        "counted on tensors without data. No GPU was there, and nothing was measured. PyTorch "
        f"{doc['environment']['packages']['torch']}; commit {commits(doc)}.",
        "",
        line("scenario", *(f"`{c}`" for c in columns)),
        line("---", *["---:"] * len(columns)),
    ]
    for name, rows in by_scenario(doc).items():
        cells = [
            amount(rows[c]["extra_bytes"]) if rows[c]["status"] == "ok" else rows[c]["status"]
            for c in columns
        ]
        lines.append(line(name, *cells))
    more = [
        f"than `{r['provider']}` on {name} ({amount(ours['extra_bytes'])} against "
        f"{amount(r['extra_bytes'])})"
        for name, rows in by_scenario(doc).items()
        for r in rows.values()
        if (ours := rows.get("fastdpo"))
        and "extra_bytes" in ours
        and not r["provider"].startswith("fastdpo")
        and r.get("extra_bytes", ours["extra_bytes"]) < ours["extra_bytes"]
    ]
    lines += [
        "",
        f"Where fastdpo's default needs more: {'; '.join(more) or 'nowhere here'}. Who of them is "
        "as accurate as eager PyTorch is not asked here, but in the table of accuracy.",
    ]
    return "\n".join(lines)


def plot(doc: dict[str, Any], path: Path) -> None:
    """Extra memory against tokens, of the head that has most lengths."""
    lines: dict[str, list[dict[str, Any]]] = {}
    ok = [r for r in doc["results"] if r["status"] == "ok"]
    groups: dict[tuple[Any, ...], set[int]] = {}
    key = ("head", "share", "trains", "dtype", "sequences")
    for r in ok:
        s = r["scenario"]
        groups.setdefault(tuple(s[k] for k in key), set()).add(s["tokens"])
    chosen = max(groups, key=lambda g: len(groups[g]))
    for r in ok:
        if tuple(r["scenario"][k] for k in key) == chosen:
            lines.setdefault(r["provider"], []).append(r)
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    for name, rows in lines.items():
        style = {"color": OURS, "lw": 2.2 if name == "fastdpo" else 1.2}
        points = [(r["scenario"]["tokens"], r["extra_bytes"] / 2**30) for r in rows]
        axis.plot(
            *zip(*sorted(points), strict=True),
            "o--" if name == "fastdpo-w0" else "o-",
            ms=3,
            label=name,
            **(style if name.startswith("fastdpo") else {"lw": 1.0}),
        )
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="extra memory, GiB")
    axis.axhline(80, color="black", lw=0.8, ls=":")
    axis.annotate("80 GiB", (0.01, 80), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)
    head, share, trains, dtype, _ = chosen
    axis.set_title(
        f"{head}, {share:.0%} carry loss, {trains}, {dtype}: counted, not measured", fontsize=8
    )
    save(figure, path)
