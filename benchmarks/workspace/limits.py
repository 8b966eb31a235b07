"""What the default workspace and an empty one promise, against what was measured."""

from __future__ import annotations

from typing import Any


def promises(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the sweep's rows of one dtype: ratios to eager, limits, and whether they are kept."""
    by_name = {r["provider"]: r for r in rows}
    eager, default, empty = by_name["eager"], by_name["default"], by_name["0 of E"]
    time = default["seconds"]["median"] / eager["seconds"]["median"]
    ratios = (
        ("default: memory / eager's", default["extra_bytes"] / eager["extra_bytes"], 0.25),
        ("default: time / eager's", time, 1.0),
        ("workspace 0: memory / eager's", empty["extra_bytes"] / eager["extra_bytes"], 0.1),
    )
    return [
        {"promise": text, "limit": limit, "measured": ratio, "kept": ratio <= limit}
        for text, ratio, limit in ratios
    ]


def by_dtype(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The promises of each dtype of a sweep."""
    dtypes = dict.fromkeys(r["scenario"]["dtype"] for r in rows)
    return {d: promises([r for r in rows if r["scenario"]["dtype"] == d]) for d in dtypes}
