"""The README's table: a few figures of benchmarks/results, ours beside eager PyTorch's and the best
peer's, whoever wins; where that one is not known to keep the rule of accuracy, the best that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.report.terminal import amount, duration
from benchmarks.step.loops import WATERFALL


class Figure(NamedTuple):
    """One row: which document, which of its results, and what of them."""

    document: str
    what: str  # {answer}: the mean length of what the document's pairs answer
    scenario: str | None  # None: the document is about one
    measure: Callable[[dict[str, Any]], float]
    shown: Callable[[float], str]
    ours: str = "fastdpo"
    most: bool = False  # the best is the largest


def _extra(row: dict[str, Any]) -> float:
    return row["extra_bytes"]


def _median(row: dict[str, Any]) -> float:
    return row["seconds"]["median"]


def _pairs_per_second(row: dict[str, Any]) -> float:
    return row["pairs_per_second"]


ROWS = (
    Figure(
        "counted",
        "memory of the loss step, Llama-3-8B's head, bf16, 8,192 tokens",
        "llama-3-8b 8k 50% head bf16",
        _extra,
        amount,
    ),
    Figure(
        "counted",
        "… of a reference's forward",
        "llama-3-8b 8k 50% forward bf16",
        _extra,
        amount,
    ),
    Figure(
        "cpu-loss",
        "time of the loss step, V 32,768, D 1,024, fp32, 2,048 tokens",
        "mistral-vocab-d1024 2k 25% head fp32",
        _median,
        duration,
    ),
    Figure(
        "cpu-loss",
        "… V 128,256, D 512, fp32, 512 tokens",
        "llama-3-vocab-d512 512 100% head fp32",
        _median,
        duration,
    ),
    Figure(
        "cpu-step",
        "pairs per second of a 36 M Llama's whole step, answers of {answer} tokens",
        None,
        _pairs_per_second,
        "{:.2f}".format,
        ours="token-budget",
        most=True,
    ),
    Figure(
        "cpu-step-hh",
        "… dialogues, answers of {answer} tokens",
        None,
        _pairs_per_second,
        "{:.2f}".format,
        ours="shared-prompts",
        most=True,
    ),
)


def table(docs: dict[str, dict[str, Any]]) -> str:
    """Markdown; a row whose document is not there is left out."""
    lines = [
        "| | fastdpo | eager PyTorch | best peer | how |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    kept = _keeps_the_rule(docs)
    for figure in ROWS:
        if figure.document in docs:
            doc = docs[figure.document]
            # What is counted has computed nothing; who was timed had passed.
            lines.append(_line(figure, doc, kept if doc["kind"] == "counted" else {}))
    return "\n".join(lines)


def _keeps_the_rule(docs: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Of the peers whose accuracy was measured."""
    kept: dict[str, bool] = {}
    for doc in docs.values():
        for r in doc["results"] if doc["kind"] == "accuracy" else ():
            if r["status"] == "ok":
                kept[r["provider"]] = kept.get(r["provider"], True) and r["passes"]
    return kept


def _line(figure: Figure, doc: dict[str, Any], kept: dict[str, bool]) -> str:
    rows = {
        r["provider"]: figure.measure(r)
        for r in doc["results"]
        if r["status"] == "ok"
        and r["provider"] != "products"
        and figure.scenario in (None, r.get("scenario", {}).get("name"))
    }
    others = ("eager", *WATERFALL)
    peers = {k: v for k, v in rows.items() if k not in others and "fastdpo" not in k}
    ranked = sorted(peers, key=lambda name: peers[name], reverse=figure.most)
    best = ranked[:1]
    if not kept.get(best[0]):
        best += [name for name in ranked if kept.get(name)][:1]
    how = "counted for a GPU" if doc["kind"] == "counted" else "measured on a CPU"
    cells = (figure.shown(rows[name]) for name in (figure.ours, "eager"))
    peer = ", ".join(
        f"{figure.shown(peers[name])} (`{name}`{'' if kept.get(name, True) else ', inaccurate'})"
        for name in best
    )
    answer = doc["protocol"].get("lengths", {}).get("mean_completion", 0)
    what = figure.what.format(answer=round(answer))
    return f"| {' | '.join((what, *cells, peer, how))} |"
