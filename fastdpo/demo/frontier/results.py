"""A sweep's records, from its folder or from the one file that they are merged into."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sweep import FORMAT

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What the figures are drawn from.

    header: settings and versions; records: one for each run.
    """

    header: dict[str, Any]
    records: tuple[Record, ...]

    def of(self, method: str, **knobs: Any) -> list[Record]:
        """The records of a method with these knobs, one for each seed."""
        return [
            record
            for record in self.records
            if record["method"] == method
            and all(record["knobs"].get(name) == value for name, value in knobs.items())
        ]

    def values(self, method: str, knob: str, **knobs: Any) -> list[Any]:
        """The values of a knob that there are records of, in ascending order (words as found)."""
        found = list(dict.fromkeys(r["knobs"][knob] for r in self.of(method, **knobs)))
        return found if any(isinstance(value, str) for value in found) else sorted(found)

    def truth(self, of: str) -> Record:
        """
        Raises:
            ValueError: the sweep has not run it.
        """
        found = self.of("truth", of=of)
        if not found:
            raise ValueError(f"results should hold the run truth-{of}")
        return found[0]

    @property
    def seeds(self) -> int:
        return len({record["seed"] for record in self.records if record["method"] != "truth"})


def load(path: Path) -> Results:
    """From a sweep's folder, or from a file that `merge` wrote.

    Raises:
        ValueError: there is neither, or of another format.
    """
    if (path / "settings.json").is_file():
        header = json.loads((path / "settings.json").read_text())
        files = sorted((path / "runs").glob("*.json"))
        records = [json.loads(file.read_text()) for file in files]
    elif path.is_file():
        header = json.loads(path.read_text())
        records = header.pop("runs", [])
    else:
        raise ValueError(f"path should be a sweep's folder or its merged file, got {path}")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"path should hold records of format {FORMAT}, got {header.get('format')} in {path}"
        )
    return Results(header, tuple(records))


def merge(results: Results, path: Path) -> None:
    """All records in one file, one a line."""
    head = json.dumps(results.header)[:-1]
    lines = ",\n".join(json.dumps(record) for record in results.records)
    path.write_text(f'{head}, "runs": [\n{lines}\n]}}\n')


Spread = tuple[float, float, float]


def spread(values: Iterable[float]) -> Spread:
    """The mean over seeds, the least and the greatest."""
    found = list(values)
    return sum(found) / len(found), min(found), max(found)


def at_end(records: list[Record], name: str) -> Spread:
    """`spread` of what the last evaluation found."""
    return spread(record["curve"][-1][name] for record in records)
