"""Preference data to token ids: `prepare`.

read_row      a row's prompt and two answers, whichever way it is written   prompts.py
render_pair   conversations to text                                         template.py
pair_ids      text to ids, and where the prompt ends                        boundary.py
truncate      to a length                                                   truncation.py
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .boundary import pair_ids
from .columns import IDS, REFERENCE
from .prompts import COLUMNS, read_row
from .template import Template, read_tools, read_variables, render_pair
from .truncation import KEEP_START, check, truncate

_TOO_LONG = ("error", "drop")
_MAP_OPTIONS = ("num_proc", "load_from_cache_file", "keep_in_memory", "writer_batch_size")
# A column of Dataset.map that `prepare` takes away again: what happened to the row.
_FATE = "fastdpo_fate"
_SPANNED, _DOES_NOT_FIT = 1, 2


class RowError(ValueError):
    """A row that cannot be used: `row`, counted from 0, `reason`, and `split` of a DatasetDict."""

    def __init__(self, row: int, reason: str, split: str | None = None):
        super().__init__(row, reason, split)  # what it is made of again in another process
        self.row, self.reason, self.split = row, reason, split

    def __str__(self) -> str:
        where = "" if self.split is None else f"split {self.split!r}, "
        return f"{where}row {self.row}: {self.reason}"


def prepare(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation_mode: str = KEEP_START,
    too_long: str = "error",
    tools: Sequence[Any] | str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    keep_columns: Sequence[str] = (),
    **map_options: Any,
) -> Any:
    """Rows of preference data to rows of token ids, in TRL's names.

    A row has `chosen` and `rejected`, strings or conversations (lists of messages with `role` and
    `content`), and a `prompt`, which may be missing or None where both begin with it, or repeat as
    a string what their conversations begin with. Conversations go through the chat template, the
    prompt with `add_generation_prompt`; strings are tokenized with the tokenizer's special tokens,
    and its `eos_token` goes behind an answer that does not end in it. The ids are those of TRL's
    DPOTrainer (1.16), but for what docs/tasks/data.md lists.

    A token that spans the end of the prompt: the prompt's ids are always those of the prompt alone,
    as the model is asked with it, and are the same for both answers. Where the ids of prompt +
    answer do not begin with them, the answer is tokenized by itself behind them, which is the same
    text, and a warning counts the rows; where that would be another text, it is an error.

    Args:
        dataset: a `datasets.Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`, or
            any iterable of dicts. A data set goes through its `map`, and is cached as by that. The
            columns `tools` (a list, or JSON of one) and `chat_template_kwargs` are read as well.
        tokenizer: of transformers.
        max_length: in tokens of prompt + answer; longer pairs are cut, see
            `fastdpo.data.truncation.truncate`. None cuts nothing.
        truncation_mode: "keep_start" cuts the ends of the answers, "keep_end" the start of the
            prompt.
        too_long: of a pair that cannot be cut, as nothing of its answers or its prompt would be
            left: "error", or "drop" it with a warning that counts them.
        tools: for the chat template, of rows that have none of their own; JSON schemas, functions,
            or JSON of a list.
        chat_template: in the place of the tokenizer's own.
        chat_template_kwargs: variables of the template; a row's own come first.
        keep_columns: columns to leave in the rows, beside `ref_chosen_logps` and
            `ref_rejected_logps`, which always stay.
        **map_options: of `Dataset.map`: num_proc, load_from_cache_file, keep_in_memory,
            writer_batch_size.

    Returns:
        Of the same kind, a list where `dataset` is no data set: rows with lists of ints
        `prompt_ids`, `chosen_ids` and `rejected_ids`, each at least one token, and the columns that
        stay. An IterableDataset does all of this, its errors and warnings too, as it is read: it
        warns of every row it drops, and once of tokens that span.

    Raises:
        ValueError: an argument, named, is none of these; or a row, by its number from 0, and a
            column: missing, empty, of another type, both answers the same, no assistant's message
            at the end of a conversation, a prompt that disagrees with the answers, a chat template
            that changes the prompt once it is answered, or a reference's log-probability that is no
            finite number; or pairs that are too long, counted. Nothing is returned then.
    """
    _check_choice("too_long", too_long, _TOO_LONG)
    check(max_length, truncation_mode)
    if not callable(tokenizer) or hasattr(tokenizer, "image_processor"):
        raise ValueError(
            f"tokenizer should be a tokenizer of transformers, got {type(tokenizer).__name__}"
            " (of a processor take its .tokenizer)"
        )
    if isinstance(keep_columns, str):
        raise ValueError(f"keep_columns should be a sequence of names, got {keep_columns!r}")
    encoder = Encoder(
        tokenizer,
        Template(chat_template, read_tools(tools), read_variables(chat_template_kwargs)),
        max_length,
        truncation_mode,
        too_long,
        tuple(keep_columns),
    )
    for name in map_options:
        _check_choice("a further option", name, _MAP_OPTIONS)
    return _prepare(dataset, encoder, map_options)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(choices)}, got {value!r}")


def _prepare(dataset: Any, encoder: Encoder, options: dict[str, Any]) -> Any:
    library = sys.modules.get("datasets")  # who has a data set has imported it
    if library is not None:
        if isinstance(dataset, (library.DatasetDict, library.IterableDatasetDict)):
            prepared = {
                name: _prepare_split(name, split, encoder, options)
                for name, split in dataset.items()
            }
            return type(dataset)(prepared)
        if isinstance(dataset, library.Dataset):
            return _prepare_dataset(dataset, encoder, options)
    if any(value is not None for value in options.values()):
        raise ValueError(f"{', '.join(options)}: only a datasets.Dataset takes these")
    if library is not None and isinstance(dataset, library.IterableDataset):
        return _prepare_stream(dataset, encoder)
    return _prepare_rows(dataset, encoder)


def _prepare_split(name: str, split: Any, encoder: Encoder, options: dict[str, Any]) -> Any:
    try:
        return _prepare(split, encoder, options)
    except RowError as error:
        raise RowError(error.row, error.reason, name) from None
    except ValueError as error:
        raise ValueError(f"split {name!r}: {error}") from None


@dataclass(frozen=True, eq=False)
class Encoder:
    """A row to its ids. `map` hashes the fields for its cache: the ids depend on nothing else."""

    tokenizer: Any
    template: Template
    max_length: int | None
    truncation_mode: str
    too_long: str
    keep_columns: tuple[str, ...]
    version: str = __version__  # another version's cache is not read

    def encode(self, row: Any, index: int) -> dict[str, Any]:
        """The ids, untruncated where they do not fit, the columns that stay and `_FATE`.

        Raises:
            RowError: with the row's number.
        """
        try:
            return self._encode(row)
        except ValueError as error:
            raise RowError(index, str(error)) from None

    def _encode(self, row: Any) -> dict[str, Any]:
        prompt, chosen, rejected = read_row(row)
        for name in ("image", "images"):
            if row.get(name) is not None and row[name] != []:
                raise ValueError(f"{name!r} should be empty: this is for text")
        conversational = isinstance(prompt, list)
        if isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list):
            template = self.template.of_row(row)
            texts = render_pair(self.tokenizer, template, prompt, chosen, rejected)
        else:
            if self.template.of_row(row).tools:
                raise ValueError("'chosen' is a string, and tools go with conversations")
            assert isinstance(prompt, str)
            assert isinstance(chosen, str)
            assert isinstance(rejected, str)
            texts = prompt, chosen, rejected
        found = pair_ids(self.tokenizer, *texts, special=not conversational)
        prompt_ids, answers = found.prompt_ids, [found.chosen_ids, found.rejected_ids]
        fate = _SPANNED * found.spanned
        try:
            cut = truncate(prompt_ids, answers, self.max_length, self.truncation_mode)
            prompt_ids, answers = list(cut[0]), [list(answer) for answer in cut[1]]
        except ValueError:
            fate |= _DOES_NOT_FIT
        kept = {name: _kept(row, name) for name in self.keep_columns}
        return {
            **kept,
            **_references(row),
            **dict(zip(IDS, (prompt_ids, *answers), strict=True)),
            _FATE: fate,
        }

    def why_too_long(self, row: Mapping[str, Any]) -> str:
        """What `truncate` says of an encoded row that does not fit."""
        try:
            prompt, *answers = (row[name] for name in IDS)
            truncate(prompt, answers, self.max_length, self.truncation_mode)
        except ValueError as error:
            return str(error)
        raise AssertionError("the row fits")


def _kept(row: Mapping[str, Any], name: str) -> Any:
    if name in IDS or name == _FATE:
        raise ValueError(f"keep_columns should have columns of text, got {name!r}")
    if name not in row:
        raise ValueError(f"missing the column {name!r} of keep_columns")
    return row[name]


def _references(row: Mapping[str, Any]) -> dict[str, float]:
    present = [name for name in REFERENCE if name in row]
    if len(present) == 1:
        raise ValueError(f"{present[0]!r} should come with the other of {', '.join(REFERENCE)}")
    for name in present:
        value = row[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{name!r} should be a finite number, got {value!r}")
    return {name: row[name] for name in present}


def _prepare_rows(rows: Iterable[Any], encoder: Encoder) -> list[dict[str, Any]]:
    encoded = [encoder.encode(row, index) for index, row in enumerate(rows)]
    fates = [row.pop(_FATE) for row in encoded]
    fits = _report(fates, encoder, encoded)
    return encoded if len(fits) == len(encoded) else [encoded[index] for index in fits]


def _prepare_dataset(dataset: Any, encoder: Encoder, options: dict[str, Any]) -> Any:
    names = dataset.column_names
    if dataset.format["type"] != "custom":  # a transform is the user's; tensors and arrays are not
        dataset = dataset.with_format(None)
    mapped = dataset.map(
        _encode_of_dataset,
        with_indices=True,
        fn_kwargs={"encoder": encoder},
        remove_columns=[name for name in names if name not in _staying(encoder)],
        desc="Tokenizing pairs",
        **options,
    )
    mapped = mapped.with_format(None)
    if len(mapped) == 0:
        return mapped  # map has not run: there is no column to read
    fits = _report(mapped[_FATE][:], encoder, mapped)
    mapped = mapped.remove_columns(_FATE)
    return mapped if len(fits) == len(mapped) else mapped.select(fits)


def _prepare_stream(dataset: Any, encoder: Encoder) -> Any:
    names = dataset.column_names or list(next(iter(dataset), {}))
    mapped = dataset.with_format(None).map(
        _encode_of_stream,
        with_indices=True,
        fn_kwargs={"encoder": encoder},
        remove_columns=[name for name in names if name not in _staying(encoder)],
    )
    return mapped.filter(_fits).remove_columns(_FATE)


def _staying(encoder: Encoder) -> tuple[str, ...]:
    return (*encoder.keep_columns, *REFERENCE)


def _encode_of_dataset(row: Mapping[str, Any], index: int, encoder: Encoder) -> dict[str, Any]:
    return encoder.encode(_without_fillers(row), index)


def _encode_of_stream(row: Mapping[str, Any], index: int, encoder: Encoder) -> dict[str, Any]:
    found = encoder.encode(_without_fillers(row), index)
    if found[_FATE] & _DOES_NOT_FIT:
        reason = encoder.why_too_long(found)
        if encoder.too_long == "error":
            raise RowError(index, reason)
        warnings.warn(f"row {index} is dropped: {reason}", stacklevel=2)
    elif found[_FATE] & _SPANNED:
        warnings.warn(f"in some rows {_SPANNING}", stacklevel=2)
    return found


def _fits(row: Mapping[str, Any]) -> bool:
    return not row[_FATE] & _DOES_NOT_FIT


def _without_fillers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow gives every message, call and tool the keys of all the others, with None as value."""
    return {
        name: _pruned(value) if name in (*COLUMNS, "tools", "chat_template_kwargs") else value
        for name, value in row.items()
    }


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _pruned(item)
            for key, item in value.items()
            if item is not None or key == "content"
        }
    return [_pruned(item) for item in value] if isinstance(value, list) else value


_SPANNING = (
    "a token spans the end of the prompt and the beginning of an answer. The prompt's tokens are "
    "kept as they are when the model is asked, and the answer is tokenized by itself. To have "
    "whole tokens, let the answers, not the prompt, have the white space between them"
)


def _report(fates: Sequence[int], encoder: Encoder, encoded: Any) -> list[int]:
    """The rows that fit.

    Raises:
        ValueError: some do not, and are not to be dropped.
    """
    fits = [index for index, fate in enumerate(fates) if not fate & _DOES_NOT_FIT]
    if len(fits) < len(fates):
        first = next(index for index, fate in enumerate(fates) if fate & _DOES_NOT_FIT)
        what = (
            f"{len(fates) - len(fits)} of {len(fates)} pairs are too long (the first is row "
            f"{first}: {encoder.why_too_long(encoded[first])})"
        )
        if encoder.too_long == "error":
            raise ValueError(f'{what}. Raise max_length, or leave them out with too_long="drop"')
        warnings.warn(f"{what} and are dropped", stacklevel=_caller())
    spanned = sum(bool(fates[index] & _SPANNED) for index in fits)
    if spanned:
        warnings.warn(f"in {spanned} of {len(fits)} rows {_SPANNING}", stacklevel=_caller())
    return fits


def _caller() -> int:
    """The `stacklevel` of who called `prepare`, from where this is called."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame, level = frame.f_back, level + 1
    return level
