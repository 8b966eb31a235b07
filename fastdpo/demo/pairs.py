"""Preference pairs, and reading them from a file of JSON lines or a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.prompts import COLUMNS, Text, read_row
from .options import InputError


@dataclass(frozen=True)
class Pair:
    """One prompt and two answers; all strings, or all lists of messages with role and content."""

    prompt: Text
    chosen: Text
    rejected: Text
    flaw: str = ""  # what is wrong with the rejected answer, where that is known
    good: frozenset[str] = frozenset()  # every good answer to the prompt, where they are known
    where: str = field(default="--data", compare=False)  # the file and line it was read from


def read_pairs(path: Path) -> list[Pair]:
    """One JSON object a line, or the rows of a Parquet file (`.parquet`, which needs pyarrow).

    The columns are chosen and rejected, each a string or a list of messages, and prompt, which may
    be missing or null where both begin with it (see fastdpo.data.prompts). Others are not read.

    Raises:
        InputError: naming the file, the line or row, and the column.
    """
    rows = _parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    pairs = [_pair(row, where) for row, where in rows]
    if len(pairs) < 2:
        raise InputError(f"{path}: expected at least 2 pairs, one to train on and one held out")
    return pairs


def json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Every line's value, and where it stands.

    Raises:
        InputError: naming the file and the line.
    """
    try:
        # By \n alone: JSON strings may hold the other characters that end lines.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"--data {path} cannot be read: {reason}") from None
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        yield row, where


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"--data {path} needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            present = [name for name in COLUMNS if name in file.schema_arrow.names]
            rows = file.read(columns=present).to_pylist() if present else [{}]
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"--data {path} cannot be read: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield row, f"{path}, row {number}"


def _pair(row: Any, where: str) -> Pair:
    try:
        return Pair(*read_row(row), where=where)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
