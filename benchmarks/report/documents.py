"""The JSON that benchmarks write and the report reads: one document per run.

{"schema": 1, "kind": ..., "title": ..., "environment": {...}, "protocol": {...},
 "results": [{"provider": ..., "status": ..., ...}, ...]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = 1
KINDS = ("loss", "workspace", "accuracy", "step", "max_tokens", "kernels", "counted")
# What became of a provider: measured; not on this machine; no answer to this scenario; raised;
# broke the rule of accuracy (and was not timed); no time was left.
STATUSES = ("ok", "absent", "refused", "failed", "inaccurate", "skipped")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def document(
    kind: str, title: str, env: dict[str, Any], protocol: dict[str, Any], results: list[Any]
) -> dict[str, Any]:
    made = {
        "schema": SCHEMA,
        "kind": kind,
        "title": title,
        "environment": env,
        "protocol": protocol,
        "results": results,
    }
    validate(made)
    return made


def origin(env: dict[str, Any]) -> str:
    """The commit in short; "+" where the code had changes that it does not hold."""
    return (env["commit"]["id"] or "unknown")[:10] + ("+" if env["commit"]["modified"] else "")


def validate(doc: dict[str, Any]) -> None:
    """Raises ValueError where `doc` is not what this module describes."""
    if doc.get("schema") != SCHEMA or doc.get("kind") not in KINDS:
        raise ValueError(
            f"document should have schema {SCHEMA} and a kind among {', '.join(KINDS)}, got "
            f"{doc.get('schema')!r} and {doc.get('kind')!r}"
        )
    for key in ("device", "hardware", "packages", "commit"):
        if key not in doc.get("environment", {}):
            raise ValueError(f"document's environment should have {key!r}")
    for row in doc["results"]:
        if not {"provider", "status"} <= row.keys():
            raise ValueError(f"results should have provider and status, got {sorted(row)}")
        if row["status"] not in STATUSES:
            raise ValueError(f"status should be among {STATUSES}, got {row['status']!r}")
        if row["status"] != "ok" and not row.get("reason"):
            raise ValueError(f"{row['provider']} is {row['status']} without a reason")
        for name in ("seconds", "extra_bytes"):
            if isinstance(row.get(name), dict) and not {"median", "p20", "p80"} <= row[name].keys():
                raise ValueError(f"{row['provider']}: {name} should have median, p20 and p80")


def save(doc: dict[str, Any], path: Path, append: bool = False) -> dict[str, Any]:
    """Write `doc`, each row with its commit, and return what was written; with `append`, scenarios
    that `path` has and `doc` has not are kept.
    """
    for row in doc["results"]:
        row.setdefault("commit", origin(doc["environment"]))
    if append and path.exists():
        doc = merged(load(path), doc)
    validate(doc)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(doc, indent=1, allow_nan=False) + "\n")
    return doc


def load(path: Path) -> dict[str, Any]:
    doc = json.loads(path.read_text())
    validate(doc)
    return doc


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the scenarios of `new` added, or replaced where it has them.

    Raises:
        ValueError: where kind, hardware or versions differ; commits may, and stand in the rows.
    """
    differ = [
        key
        for key in ("hardware", "packages")
        if _fixed(old["environment"][key]) != _fixed(new["environment"][key])
    ]
    if old["kind"] != new["kind"] or differ:
        raise ValueError(f"documents should agree in kind, hardware, packages, not in {differ}")
    measured = {r["scenario"]["name"] for r in new["results"]}
    kept = [r for r in old["results"] if r["scenario"]["name"] not in measured]
    return {**new, "results": kept + new["results"]}


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    """What a machine is, without what it happens to run at."""
    passing = ("clocks.", "temperature.", "power.", "utilization.")
    return {key: value for key, value in values.items() if not key.startswith(passing)}


def load_all(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every document of a folder, by file name without suffix."""
    return {p.stem: load(p) for p in sorted(folder.glob("*.json"))}


def finite(value: float) -> float | None:
    """JSON has no infinity: None stands for it."""
    return value if value == value and abs(value) != float("inf") else None
