"""What the pages of several kinds of documents share."""

from __future__ import annotations

from typing import Any

from benchmarks.environment import describe
from benchmarks.report.documents import origin

# The columns of the loss table: every peer once, in its best known form per device.
_COLUMNS = (
    *("fastdpo", "fastdpo-w0", "eager", "compiled", "torch-lce-chunked", "trl-chunked", "liger-1"),
    *("liger-scaled", "cce-compile"),
)
_COLUMNS_GPU = (
    *("fastdpo", "fastdpo-w0", "eager", "compiled", "torch-lce-chunked", "trl-chunked"),
    *("liger-1-compiled", "liger-scaled", "liger-sm90", "flash-attn", "cce", "cce-exact"),
)


def peers(doc: dict[str, Any]) -> tuple[str, ...]:
    """Those of the columns that the document has."""
    columns = _COLUMNS_GPU if doc["environment"]["device"] == "cuda" else _COLUMNS
    there = {r["provider"] for r in doc["results"]}
    return tuple(c for c in columns if c in there)


def by_scenario(doc: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by scenario's name and provider."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for r in doc["results"]:
        found.setdefault(r["scenario"]["name"], {})[r["provider"]] = r
    return found


def source(doc: dict[str, Any]) -> str:
    env = doc["environment"]
    return f"{describe(env)}; PyTorch {env['packages']['torch']}; commit {commits(doc)}."


def commits(doc: dict[str, Any]) -> str:
    here = origin(doc["environment"])
    return ", ".join(dict.fromkeys(r.get("commit", here) for r in doc["results"])) or here


def number(errors: dict[str, Any] | None, norm: str) -> str:
    if errors is None:
        return "–"
    return "not finite" if errors[norm] is None else f"{errors[norm]:.1e}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
