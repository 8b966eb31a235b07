"""The folder that a reference lies in, which a kill at any moment leaves whole.

    reference.json                      the key, versions, and whether it is finished
    batches.json                        the batches it was computed in, lists of indices
    data/train-00000-of-00001.parquet   the rows, in the order of the data set, once it is finished
    .unfinished/part-00000000-*.parquet what is there before: by batches, from one to another

Files are written under another name, and renamed once they are on the disk. The last step, rows by
batches to rows in order, reads what was computed and is begun again after a kill.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

FORMAT = 1
ROWS_PER_FILE = 10_000
_MANIFEST, _BATCHES, _DATA, _PARTS, _LOCK = (
    "reference.json",
    "batches.json",
    "data",
    ".unfinished",
    ".lock",
)
_TEMPORARY = ".writing-"


@dataclass
class Answers:
    """Of some examples: their numbers, and what the reference says of them."""

    # NumPy's numbers, and arrays [length of the answer]: Arrow takes their dtype.
    example: list[int] = field(default_factory=list)
    ref_chosen_logps: list[Any] = field(default_factory=list)
    ref_rejected_logps: list[Any] = field(default_factory=list)
    ref_chosen_token_logps: list[Any] = field(default_factory=list)
    ref_rejected_token_logps: list[Any] = field(default_factory=list)


class Folder:
    """Where things are in it, and how they are written."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._parts = self.path / _PARTS

    # ---- What is there

    def check(self, argument: str) -> None:
        """
        Raises:
            ValueError: it is no place to write into, or holds something else.
        """
        if not self.path.exists():
            above = next(p for p in self.path.absolute().parents if p.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise ValueError(
                    f"{argument} {str(self.path)!r} cannot be made: {above} takes no files"
                )
        elif not self.path.is_dir():
            raise ValueError(f"{argument} should be a folder, got the file {str(self.path)!r}")
        elif self.manifest() is None and any(map(_foreign, self.path.iterdir())):
            raise ValueError(
                f"{argument} should be a new folder, or one with a reference, got "
                f"{str(self.path)!r}, which holds something else"
            )

    def manifest(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(
                f"{str(self.path / _MANIFEST)!r} should be one that this version of fastdpo writes"
            )
        return found

    def batches(self) -> list[list[int]]:
        return json.loads((self.path / _BATCHES).read_text(encoding="utf-8"))

    def files(self) -> list[str]:
        return [str(p) for p in sorted((self.path / _DATA).glob("train-*.parquet"))]

    def done(self) -> int:
        """How many batches are: the first one that is missing."""
        count = 0
        for first, end, _ in self._found_parts():
            if first != count:
                break
            count = end
        return count

    def _found_parts(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in sorted(self._parts.glob("part-*.parquet")):
            _, first, end = path.stem.split("-")
            found.append((int(first), int(end), path))
        return found

    # ---- Writing

    @contextmanager
    def locked(self, argument: str) -> Iterator[None]:
        """The system takes the lock from a process that is killed.

        Raises:
            ValueError: another process writes here.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.path / _LOCK))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{argument} {str(self.path)!r} is being written by another process: wait for it, "
                "or give another folder"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, manifest: Mapping[str, Any], batches: Sequence[Sequence[int]]) -> None:
        """Whatever lies there is done away with."""
        shutil.rmtree(self._parts, ignore_errors=True)
        shutil.rmtree(self.path / _DATA, ignore_errors=True)
        self._write_text(_BATCHES, json.dumps([list(batch) for batch in batches]) + "\n")
        self._write_manifest({**manifest, "finished": False})

    def write_part(self, first: int, end: int, answers: Answers) -> None:
        """Of the batches [first, end)."""
        import pyarrow

        self._parts.mkdir(exist_ok=True)
        table = pyarrow.table(vars(answers))
        self._write_table(self._parts / f"part-{first:08d}-{end:08d}.parquet", table)

    def finish(self, ids_of: Callable[[int], Mapping[str, Any]]) -> None:
        """Brings what was computed into the order of the data set, beside the ids."""
        import pyarrow
        from pyarrow import compute, parquet

        manifest = self.manifest()
        assert manifest is not None
        tables = [parquet.read_table(path) for _, _, path in self._found_parts()]
        whole = pyarrow.concat_tables(tables)
        whole = whole.take(compute.sort_indices(whole["example"]))
        count = manifest["examples"]
        if not whole["example"].equals(pyarrow.chunked_array([pyarrow.array(range(count))])):
            raise AssertionError("the parts are not of every example once")
        whole = whole.drop_columns(["example"])
        (self.path / _DATA).mkdir(exist_ok=True)
        files = -(-count // ROWS_PER_FILE)
        for number in range(files):
            start = number * ROWS_PER_FILE
            rows = whole.slice(start, ROWS_PER_FILE).combine_chunks()
            ids = [ids_of(i) for i in range(start, start + rows.num_rows)]
            kind = pyarrow.list_(pyarrow.int32())
            columns = {name: pyarrow.array([e[name] for e in ids], kind) for name in ids[0]}
            columns |= {name: rows[name] for name in rows.column_names}
            path = self.path / _DATA / f"train-{number:05d}-of-{files:05d}.parquet"
            self._write_table(path, pyarrow.table(columns))
        self._write_manifest({**manifest, "finished": True})
        self.tidy()

    def tidy(self) -> None:
        """What a kill has left behind."""
        manifest = self.manifest()
        if manifest is not None and manifest["finished"]:
            shutil.rmtree(self._parts, ignore_errors=True)
        for path in self.path.rglob(f"{_TEMPORARY}*"):
            path.unlink()

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        self._write_text(_MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        _write(self.path / name, lambda file: file.write(text.encode()))

    def _write_table(self, path: Path, table: Any) -> None:
        from pyarrow import parquet

        _write(path, lambda file: parquet.write_table(table, file, compression="zstd"))


def _foreign(path: Path) -> bool:
    """Neither a lock nor what a kill leaves before there is a manifest."""
    return path.name not in (_LOCK, _BATCHES) and not path.name.startswith(_TEMPORARY)


def _write(path: Path, write: Callable[[Any], object]) -> None:
    temporary = path.with_name(_TEMPORARY + path.name)
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # the new name is on the disk as well
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def versions() -> dict[str, str]:
    """For whoever reads the folder; not compared."""
    names = ("fastdpo", "torch", "transformers", "peft", "datasets", "pyarrow")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}
