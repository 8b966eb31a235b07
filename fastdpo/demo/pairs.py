"""Preference pairs, and reading them from a file of JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastdpo.demo.options import InputError

Message = dict[str, str]
Text = str | list[Message]

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """One prompt and two answers; all strings, or all lists of messages with role and content."""

    prompt: Text
    chosen: Text
    rejected: Text
    flaw: str = ""  # what is wrong with the rejected answer, where that is known
    good: frozenset[str] = frozenset()  # every good answer to the prompt, where they are known

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


def read_pairs(path: Path) -> list[Pair]:
    """One JSON object a line, with the columns prompt, chosen and rejected.

    Raises:
        InputError: naming the file, the line and the column.
    """
    try:
        # By \n alone: JSON strings may hold the other characters that end lines.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"--data {path} cannot be read: {reason}") from None
    pairs = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if len(pairs) < 2:
        raise InputError(f"{path}: expected at least 2 pairs, one to train on and one held out")
    return pairs


def _parse(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with the columns {', '.join(COLUMNS)}")
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise InputError(f"{where}: missing the column {missing[0]!r}")
    for name in COLUMNS:
        _check_text(row[name], name, where)
    kinds = {isinstance(row[name], list) for name in COLUMNS}
    if len(kinds) > 1:
        raise InputError(f"{where}: the columns should be all strings or all lists of messages")
    if row["chosen"] == row["rejected"]:
        raise InputError(f"{where}: chosen and rejected are the same")
    return Pair(row["prompt"], row["chosen"], row["rejected"])


def _check_text(value: object, name: str, where: str) -> None:
    if isinstance(value, str):
        if name != "prompt" and not value.strip():
            raise InputError(f"{where}: {name!r} is empty")
        return
    if not isinstance(value, list):
        raise InputError(f"{where}: {name!r} should be a string or a list of messages")
    if not value:
        raise InputError(f"{where}: {name!r} is empty")
    for message in value:
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in keys
        ):
            raise InputError(f"{where}: {name!r} should hold messages with 'role' and 'content'")
    if name != "prompt" and not any(message["content"].strip() for message in value):
        raise InputError(f"{where}: {name!r} is empty")
