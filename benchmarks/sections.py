"""Markdown of one document each, for `benchmarks.report`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.documents import origin
from benchmarks.environment import describe
from benchmarks.promises import by_dtype
from benchmarks.tables import amount, duration

# The columns of the loss table: every peer once, in its best known form per device.
_COLUMNS = ("fastdpo", "fastdpo-w0", "eager", "compiled", "trl-chunked", "liger-1", "cce-compile")
_COLUMNS_GPU = (
    *("fastdpo", "fastdpo-w0", "eager", "compiled", "trl-chunked", "liger-1-compiled"),
    *("cce", "cce-exact"),
)


def loss(doc: dict[str, Any]) -> str:
    columns = _columns(doc)
    lines = [
        "**The DPO loss step**: time as a multiple of the floor (the bare matrix products of the "
        "rows that carry loss), and peak memory beyond inputs and gradients. " + _source(doc),
        "",
        _row("scenario", "floor", *(f"`{c}`" for c in columns)),
        _row("---", *["---:"] * (len(columns) + 1)),
    ]
    for name, rows in by_scenario(doc).items():
        floor = rows["products"]
        cells = [_loss_cell(rows.get(c)) for c in columns]
        seconds = floor["scenario"]["units"] * floor["t1_seconds"]
        lines.append(_row(name, duration(seconds), *cells))
    lines += ["", *_remarks(doc)]
    return "\n".join(lines)


def _loss_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["status"] != "ok":
        return row["status"]
    text = f"{row['multiple_of_floor']:.2f}"
    return f"{text}, {amount(row['extra_bytes'])}" if "extra_bytes" in row else text


def _remarks(doc: dict[str, Any]) -> list[str]:
    """Where fastdpo loses, who is inaccurate, and who is absent."""
    lost, wrong, gone = [], [], {}
    for name, rows in by_scenario(doc).items():
        ours = rows.get("fastdpo")
        for r in rows.values():
            peer = f"`{r['provider']}`"
            if r["status"] == "inaccurate":
                wrong.append(f"{peer} on {name} ({r['reason'].split(';')[0]})")
            elif r["status"] in ("absent", "failed"):
                gone[peer] = r["reason"]
            elif r["provider"] != "products" and not r["provider"].startswith("fastdpo"):
                lost += _losses_to(r, ours, name)
    lines = []
    lines.append("Where fastdpo's default loses: " + ("; ".join(lost) or "nowhere here") + ".")
    if wrong:
        lines.append("Not as accurate as eager PyTorch, so not timed: " + "; ".join(wrong) + ".")
    if gone:
        listed = "; ".join(f"{peer} ({reason})" for peer, reason in gone.items())
        lines.append(f"Not here: {listed}.")
    return ["\n\n".join(lines)]


def _losses_to(peer: dict[str, Any], ours: dict[str, Any] | None, scenario: str) -> list[str]:
    if ours is None or ours["status"] != "ok" or peer["status"] != "ok":
        return []
    found = []
    mine, theirs = ours["seconds"]["median"], peer["seconds"]["median"]
    if theirs < mine:
        found.append(
            f"time against `{peer['provider']}` on {scenario} "
            f"({duration(mine)} against {duration(theirs)})"
        )
    if "extra_bytes" in ours and peer.get("extra_bytes", ours["extra_bytes"]) < ours["extra_bytes"]:
        found.append(
            f"memory against `{peer['provider']}` on {scenario} "
            f"({amount(ours['extra_bytes'])} against {amount(peer['extra_bytes'])})"
        )
    return found


def workspace(doc: dict[str, Any]) -> str:
    first = doc["results"][0]["scenario"]
    lines = [
        f"**Time and memory against the workspace**, V {first['vocab_size']:,}, "
        f"D {first['hidden_size']:,}, {first['carrying']:,} tokens. " + _source(doc),
        "",
        _row("dtype", "workspace", "time", "× floor", "extra memory"),
        _row("---", "---", "---:", "---:", "---:"),
    ]
    for r in doc["results"]:
        cells = duration(r["seconds"]["median"]), f"{r['multiple_of_floor']:.2f}"
        lines.append(_row(r["scenario"]["dtype"], r["provider"], *cells, amount(r["extra_bytes"])))
    lines.append("")
    for dtype, promises in by_dtype(doc["results"]).items():
        told = (
            f"{p['promise']} {p['measured']:.2f} (at most {p['limit']:g}: "
            f"{'kept' if p['kept'] else '**not kept**'})"
            for p in promises
        )
        lines.append(f"{dtype}: {'; '.join(told)}.\n")
    return "\n".join(lines).strip()


def accuracy(doc: dict[str, Any]) -> str:
    measured = [r for r in doc["results"] if r["status"] == "ok"] or doc["results"]
    longest: dict[bool, int] = {}  # of a peaked softmax, and of a flat one
    for r in measured:
        s = r["scenario"]
        longest[s["peaked"]] = max(longest.get(s["peaked"], 0), s["tokens"])
    rows = [r for r in measured if r["scenario"]["tokens"] == longest[r["scenario"]["peaked"]]]
    scenario = rows[0]["scenario"]
    lines = [
        f"**Accuracy** against {rows[0]['oracle']}, {scenario['head']}, {scenario['dtype']}: the "
        "longest pair measured of each softmax, by the tokens of one sequence. " + _source(doc),
        "",
        _row(
            *("provider", "softmax", "nats per token, RMS", "nats per sequence, largest"),
            *("∂hidden, relative RMS", "∂weight, relative RMS", "margin at initialisation", "rule"),
        ),
        _row("---", "---", *["---:"] * 5, "---"),
    ]
    for r in rows:
        if r["status"] != "ok" or r["provider"] not in (*_columns(doc), "trl-selective"):
            continue
        cells = (
            _number(r.get("token_nats"), "rms"),
            _number(r["sequence_nats"], "max"),
            _number(r.get("hidden_relative"), "rms"),
            _number(r.get("weight_relative"), "rms"),
        )
        margin = r["margin_at_initialisation"]
        start = "not finite" if margin is None else "0" if margin == 0 else f"{margin:.1e}"
        s = r["scenario"]
        kind = "peaked" if s["peaked"] else "flat"
        kind += f", {s['tokens'] // s['sequences']:,}"
        rule = "kept" if r["passes"] else "**broken**"
        lines.append(_row(f"`{r['provider']}`", kind, *cells, start, rule))
    return "\n".join(lines)


def step(doc: dict[str, Any]) -> str:
    how, first = doc["protocol"], doc["results"][0]
    lengths = how["lengths"]
    lines = [
        f"**A whole training step**: {first['model']}, {first['batch_size']} pairs per step, "
        f"{how['shape']} lengths (mean prompt {lengths['mean_prompt']:.0f}, mean completion "
        f"{lengths['mean_completion']:.0f} tokens), {how['precision']}. " + _source(doc),
        "",
        _row("loop", "step", "pairs / s", "peak memory", "largest difference from eager's loss"),
        _row("---", *["---:"] * 4),
    ]
    absent = []
    for r in doc["results"]:
        if r["status"] != "ok":
            absent.append(f"`{r['provider']}` ({r['reason']})")
            continue
        difference = r.get("largest_loss_difference")
        lines.append(
            _row(
                f"`{r['provider']}`",
                duration(r["seconds"]["median"]),
                f"{r['pairs_per_second']:.2f}",
                amount(r["peak_bytes"]),
                "" if difference is None else f"{difference:.1e}",
            )
        )
    if absent:
        lines += ["", f"Not here: {'; '.join(absent)}."]
    return "\n".join(lines)


def max_tokens(doc: dict[str, Any]) -> str:
    first = doc["results"][0]
    lines = [
        f"**The longest pair that fits** {amount(first['limit_bytes'])}, "
        f"{first['scenario']['head']}, {first['scenario']['dtype']}. " + _source(doc),
        "",
        _row("provider", "tokens"),
        _row("---", "---:"),
    ]
    lines += [
        _row(f"`{r['provider']}`", f"{r['max_tokens']:,}")
        for r in doc["results"]
        if r["status"] == "ok"
    ]
    return "\n".join(lines)


def counted(doc: dict[str, Any]) -> str:
    columns = [r["provider"] for r in doc["results"] if r["status"] != "absent"]
    columns = list(dict.fromkeys(columns))
    lines = [
        "**Memory of a step** beyond inputs and gradients: allocations of the GPU's code path, "
        "counted on tensors without data. No GPU was there, and nothing was measured. PyTorch "
        f"{doc['environment']['packages']['torch']}; commit {_commits(doc)}.",
        "",
        _row("scenario", *(f"`{c}`" for c in columns)),
        _row("---", *["---:"] * len(columns)),
    ]
    for name, rows in by_scenario(doc).items():
        cells = [
            amount(rows[c]["extra_bytes"]) if rows[c]["status"] == "ok" else rows[c]["status"]
            for c in columns
        ]
        lines.append(_row(name, *cells))
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
    lines += ["", f"Where fastdpo's default needs more: {'; '.join(more) or 'nowhere here'}."]
    return "\n".join(lines)


def kernels(doc: dict[str, Any]) -> str:
    lines = [
        "**Each primitive** against its floor: the vendor's product of the same shape, or a device "
        "copy of as many bytes. " + _source(doc),
        "",
        _row("primitive and shape", "backend", "time", "× floor", "of it", "reaches", "bound by"),
        _row("---", "---", "---:", "---:", "---:", "---:", "---"),
    ]
    for r in doc["results"]:
        if r["status"] != "ok":
            continue
        products = r["bound"] == "products"
        rate = r["tera_operations_per_second" if products else "tera_bytes_per_second"]
        reached = f"{rate:.3g} {'TFLOP/s' if products else 'TB/s'}"
        multiple = r["multiple_of_floor"]
        cells = duration(r["seconds"]["median"]), f"{multiple:.2f}", f"{1 / multiple:.0%}", reached
        lines.append(_row(r["scenario"]["name"], f"`{r['provider']}`", *cells, r["bound"]))
    return "\n".join(lines)


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "loss": loss,
    "workspace": workspace,
    "accuracy": accuracy,
    "step": step,
    "max_tokens": max_tokens,
    "kernels": kernels,
    "counted": counted,
}


def _columns(doc: dict[str, Any]) -> tuple[str, ...]:
    return _COLUMNS_GPU if doc["environment"]["device"] == "cuda" else _COLUMNS


def by_scenario(doc: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by scenario's name and provider."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for r in doc["results"]:
        found.setdefault(r["scenario"]["name"], {})[r["provider"]] = r
    return found


def _source(doc: dict[str, Any]) -> str:
    env = doc["environment"]
    return f"{describe(env)}; PyTorch {env['packages']['torch']}; commit {_commits(doc)}."


def _commits(doc: dict[str, Any]) -> str:
    here = origin(doc["environment"])
    return ", ".join(dict.fromkeys(r.get("commit", here) for r in doc["results"])) or here


def _number(errors: dict[str, Any] | None, norm: str) -> str:
    if errors is None:
        return "–"
    return "not finite" if errors[norm] is None else f"{errors[norm]:.1e}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
