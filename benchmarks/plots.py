"""The plots of docs/benchmarks.md, from a document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.environment import describe

OURS, EAGER, PEER = "#c0392b", "#7f8c8d", "#2c7fb8"


def workspace(doc: dict[str, Any], path: Path) -> None:
    """Time and extra memory against the workspace, one column of panels per dtype."""
    dtypes = list(dict.fromkeys(r["scenario"]["dtype"] for r in doc["results"]))
    figure, axes = plt.subplots(
        2, len(dtypes), figsize=(4.6 * len(dtypes), 5.6), sharex="col", squeeze=False
    )
    for column, dtype in enumerate(dtypes):
        rows = [r for r in doc["results"] if r["scenario"]["dtype"] == dtype]
        _workspace_panels(axes[:, column], rows, dtype)
    scenario = doc["results"][0]["scenario"]
    figure.suptitle(
        f"V {scenario['vocab_size']:,}, D {scenario['hidden_size']:,}, "
        f"{scenario['carrying']:,} tokens\n{describe(doc['environment'])}",
        fontsize=9,
    )
    _save(figure, path)


def _workspace_panels(axes: Any, rows: list[dict[str, Any]], dtype: str) -> None:
    scenario = rows[0]["scenario"]
    bytes_of_e = scenario["carrying"] * scenario["vocab_size"] * (4 if dtype == "fp32" else 2)
    points = [r for r in rows if r["provider"].endswith("of E")]
    x = [
        (bytes_of_e if r["workspace_bytes"] is None else r["workspace_bytes"]) / 2**20
        for r in points
    ]
    named = {r["provider"]: r for r in rows}
    for axis, value, unit in (
        (axes[0], lambda r: r["seconds"]["median"], "seconds per step"),
        (axes[1], lambda r: r["extra_bytes"] / 2**30, "extra memory, GiB"),
    ):
        axis.plot(x, [value(r) for r in points], "o-", color=OURS, label="fastdpo")
        axis.axhline(value(named["eager"]), color=EAGER, ls="--", label="eager PyTorch")
        axis.axhline(value(named["default"]), color=OURS, ls=":", label="fastdpo, default")
        axis.set_ylim(bottom=0)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
    floor = scenario["units"] * rows[0]["t1_seconds"]
    axes[0].axhline(floor, color="black", lw=0.8, label="3 bare products")
    axes[0].set_title(dtype)
    axes[0].legend(fontsize=7)
    axes[1].set_xlabel("workspace, MiB")


def loss(doc: dict[str, Any], path: Path) -> None:
    """PATH: bars of the multiples of the floor; PATH-tokens: time and memory against tokens."""
    multiples(doc, path)
    against_tokens(doc, path.with_name(f"{path.stem}-tokens{path.suffix}"))


def multiples(doc: dict[str, Any], path: Path) -> None:
    """Bars of time over the floor, one panel per scenario; 1 is the bare products."""
    panels = _by_scenario(doc)
    if not panels:
        return
    most = max(len(rows) for rows in panels.values())
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.4 * columns, (0.9 + 0.24 * most) * lines), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        rows = sorted(rows, key=lambda r: -r["multiple_of_floor"])
        values = [r["multiple_of_floor"] for r in rows]
        bars = axis.barh(
            [r["provider"] for r in rows], values, color=[_colour(r["provider"]) for r in rows]
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.axvline(1, color="black", lw=0.8)
        axis.set_xlim(0, max(values) * 1.15)
        axis.tick_params(labelsize=7)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("time / floor", fontsize=7)
    figure.suptitle(describe(doc["environment"]), fontsize=8)
    _save(figure, path)


def against_tokens(doc: dict[str, Any], path: Path) -> None:
    """Time and extra memory against tokens, where scenarios differ in nothing else."""
    series: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for r in doc["results"]:
        if r["status"] == "ok" and "seconds" in r and r["provider"] != "products":
            s = r["scenario"]
            key = tuple(s[k] for k in ("head", "share", "trains", "dtype", "reference", "peaked"))
            series.setdefault(key, {}).setdefault(r["provider"], []).append(r)
    key, lines = max(
        series.items(), key=lambda item: max(len(v) for v in item[1].values()), default=((), {})
    )
    if max((len(v) for v in lines.values()), default=0) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    for name, rows in lines.items():
        rows = sorted(rows, key=lambda r: r["scenario"]["tokens"])
        x = [r["scenario"]["tokens"] for r in rows]
        style = {"color": OURS, "lw": 2.2} if name == "fastdpo" else {"lw": 1.0}
        axes[0].plot(x, [r["seconds"]["median"] for r in rows], "o-", ms=3, label=name, **style)
        with_memory = [r for r in rows if "extra_bytes" in r]
        axes[1].plot(
            [r["scenario"]["tokens"] for r in with_memory],
            [max(r["extra_bytes"], 1 << 20) / 2**30 for r in with_memory],
            "o-",
            ms=3,
            label=name,
            **style,
        )
    for axis, text in zip(axes, ("seconds per step", "extra memory, GiB"), strict=True):
        if any(len(line.get_xdata()) for line in axis.lines):  # a log axis needs a point
            axis.set(xscale="log", yscale="log")
            _token_ticks(axis, {r["scenario"]["tokens"] for rows in lines.values() for r in rows})
        axis.set(xlabel="tokens", ylabel=text)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    head, share, trains, dtype, *_ = key
    figure.suptitle(
        f"{head}, {share:.0%} carry loss, {trains}, {dtype}\n{describe(doc['environment'])}",
        fontsize=8,
    )
    _save(figure, path)


def counted(doc: dict[str, Any], path: Path) -> None:
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
    _save(figure, path)


def accuracy(doc: dict[str, Any], path: Path) -> None:
    """The largest error of a sequence's log-probability against its length."""
    kinds = list(dict.fromkeys(r["scenario"]["peaked"] for r in doc["results"]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.8 * len(kinds), 3.6), squeeze=False)
    for axis, peaked in zip(axes[0], kinds, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for r in doc["results"]:
            s = r["scenario"]
            shown = not r["provider"].startswith("fastdpo-")  # its variants differ in no digit
            shown = shown and r["status"] == "ok" and s["peaked"] == peaked
            if shown and r["sequence_nats"]["max"]:
                point = (s["tokens"] // s["sequences"], r["sequence_nats"]["max"])
                lines.setdefault(r["provider"], []).append(point)
        for name, points in lines.items():
            style = {"color": OURS, "lw": 2.2} if name == "fastdpo" else {"lw": 1.0}
            axis.plot(*zip(*sorted(points), strict=True), "o-", ms=3, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="tokens of the sequence")
        _token_ticks(axis, {length for points in lines.values() for length, _ in points})
        axis.set_title(
            "a trained model's softmax" if peaked else "a nearly flat softmax", fontsize=9
        )
        axis.set_ylabel("largest error of a sequence, nats")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    scenario = doc["results"][0]["scenario"]
    figure.suptitle(
        f"{scenario['head']}, {scenario['dtype']}\n{describe(doc['environment'])}", fontsize=8
    )
    _save(figure, path)


def losses(doc: dict[str, Any], path: Path) -> None:
    """Loss curves of the training loops, over one another where they coincide."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    styles = {
        "fastdpo": ("-", OURS, 3.0),
        "eager": ("--", EAGER, 1.8),
        "trl": (":", PEER, 1.8),
        "trl-fastdpo": ("-.", "black", 1.0),
    }
    for r in doc["results"]:
        if r["status"] == "ok":
            line, colour, width = styles[r["provider"]]
            axis.plot(r["losses"], line, color=colour, lw=width, label=r["provider"])
    axis.set(xlabel="step", ylabel="DPO loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(
        f"{doc['results'][0]['model']}, {doc['protocol']['shape']}\n{describe(doc['environment'])}",
        fontsize=8,
    )
    _save(figure, path)


def _by_scenario(doc: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    panels: dict[str, list[dict[str, Any]]] = {}
    for r in doc["results"]:
        if r["status"] == "ok" and "multiple_of_floor" in r:
            panels.setdefault(r["scenario"]["name"], []).append(r)
    return panels


def _colour(provider: str) -> str:
    if provider.startswith("fastdpo"):
        return OURS
    return {"products": "black", "eager": EAGER}.get(provider, PEER)


def _token_ticks(axis: Any, tokens: set[int]) -> None:
    """A tick where something was measured, and nowhere else."""
    axis.set_xticks(sorted(tokens), [f"{t:,}" for t in sorted(tokens)])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
