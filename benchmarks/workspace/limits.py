"""What the default workspace and an empty one promise, against what was measured."""

from __future__ import annotations

from typing import Any


def promises(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the sweep's rows of one dtype: ratios to eager, limits, and whether they are kept."""
    by_name = {r["provider"]: r for r in rows}
    ratios = (
        ("default: memory / eager's", _memory(by_name, "default"), 0.25),
        # E computed again is a fourth product beside eager's three.
        ("default: time / eager's", _time(by_name, "default"), 4 / 3),
        ("all of E: time / eager's", _time(by_name, "1 of E"), 1.0),
        ("workspace 0: memory / eager's", _memory(by_name, "0 of E"), 0.1),
    )
    return [
        {"promise": text, "limit": limit, "measured": ratio, "kept": ratio <= limit}
        for text, ratio, limit in ratios
    ]


def _memory(rows: dict[str, dict[str, Any]], name: str) -> float:
    return rows[name]["extra_bytes"] / rows["eager"]["extra_bytes"]


def _time(rows: dict[str, dict[str, Any]], name: str) -> float:
    return rows[name]["seconds"]["median"] / rows["eager"]["seconds"]["median"]


def by_dtype(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The promises of each dtype of a sweep."""
    dtypes = dict.fromkeys(r["scenario"]["dtype"] for r in rows)
    return {d: promises([r for r in rows if r["scenario"]["dtype"] == d]) for d in dtypes}
