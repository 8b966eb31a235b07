"""A batch of pairs, rankings or single answers as trainers collate it, checked and taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from ..objectives import ResolvedObjective
from .packing import PackedTokens, refuse_restarts

IGNORE_INDEX = -100
# TRL's names: of DPOTrainer for pairs, of KTOTrainer for whatever comes as one column.
_PAIR_KEYS = ("ref_chosen_logps", "ref_rejected_logps")
_OPTIONS = ("desirable", "sample_weights")  # one number a sequence, or a pair
_SEQUENCE_KEYS = ("ref_logps",)


def reference_keys(resolved: ResolvedObjective) -> tuple[str, ...]:
    """Under which keys a batch for this objective has its precomputed reference."""
    return _PAIR_KEYS if resolved.layout == "pairs" else _SEQUENCE_KEYS


@dataclass(frozen=True)
class Tokens:
    """What is common to all batches."""

    input_ids: Tensor  # [S, T]
    shifted: Tensor  # [S, T] the label of each position's prediction; -100 carries no loss
    labels: Tensor | None  # [S, T] same positions as input_ids; None where they came shifted
    attention_mask: Tensor | None  # [S, T]

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tokens:
        """
        Raises:
            ValueError: a shape does not fit, or there are not labels of one of the kinds.
        """
        given = {"labels": labels, "shift_labels": shift_labels}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"labels should be given, or shift_labels, got {'both' if names else 'neither'}"
            )
        _check_shapes(input_ids, {**given, "attention_mask": attention_mask})
        if labels is not None:
            return cls(input_ids, shifted_labels(labels), labels, attention_mask)
        assert shift_labels is not None
        return cls(input_ids, shift_labels, None, attention_mask)

    @property
    def num_sequences(self) -> int:
        return self.input_ids.shape[0]

    @property
    def own_labels(self) -> Tensor:  # [S, T]
        """At the tokens themselves, however they came."""
        return unshifted_labels(self.shifted) if self.labels is None else self.labels

    @property
    def cu_seqlens(self) -> None:
        """A sequence is a row."""

    def at_tokens(self, values: Tensor) -> Tensor:  # [S, T] -> [S, T]
        """From the positions that predict to those that are predicted, where labels came so."""
        return values if self.labels is None else unshift(values)


@dataclass(frozen=True)
class PreferenceBatch:
    """S sequences, in the order of the objective's layout (`fastdpo.objectives.layouts`): of pairs
    the chosen ones first, of rankings the best ones."""

    tokens: Tokens | PackedTokens
    ref_logps: Tensor | None  # [S] the reference's, computed beforehand
    row_index: Tensor | None  # [N] positions among the S·T that predict a token with loss
    model_kwargs: dict[str, Any]  # everything else: pixel_values, position_ids, ...


def shifted_labels(labels: Tensor) -> Tensor:  # [S, T] -> [S, T]
    """The label of each position's prediction: the next position's label, and none at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)[:, : labels.shape[1]]


def unshifted_labels(shift_labels: Tensor) -> Tensor:  # [S, T] -> [S, T]
    """The label of each position's own token, and none at the beginning."""
    return F.pad(shift_labels[:, :-1], (1, 0), value=IGNORE_INDEX)[:, : shift_labels.shape[1]]


def unshift(values: Tensor) -> Tensor:  # [S, T] -> [S, T]
    """The inverse for what was computed per prediction: column t is about token t, column 0 is
    empty."""
    return F.pad(values[:, :-1], (1, 0))[:, : values.shape[1]]


def _check_shapes(input_ids: Tensor, others: Mapping[str, Tensor | None]) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        shape = getattr(input_ids, "shape", type(input_ids).__name__)
        raise ValueError(f"input_ids should be a tensor of shape [S, T], got {shape}")
    for name, value in others.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != input_ids.shape:
            shape = getattr(value, "shape", type(value).__name__)
            raise ValueError(
                f"{name} should have the shape of input_ids, {tuple(input_ids.shape)}, got {shape}"
            )


def check_sequences(
    shared: object, tokens: Tokens | PackedTokens, model_kwargs: Mapping[str, Any]
) -> None:
    """Which sequences lie in the rows: parts of them, where processes share them, and what a
    process cannot know of its part is then to be given; several, where the batch says so.

    Raises:
        ValueError: there is something missing.
    """
    if shared is None:
        if isinstance(tokens, Tokens):
            place = model_kwargs.get("position_ids")
            refuse_restarts(place, tokens.attention_mask, model_kwargs)
        return
    if isinstance(tokens, PackedTokens):
        raise ValueError(
            "sequence_parallel should be None for packed rows: the sequences that processes share "
            "lie in rows of their own (layout='padded')"
        )
    if tokens.labels is not None:
        raise ValueError(
            "labels should be given as shift_labels with sequence_parallel, shifted before the "
            "sequences were cut: the label of a part's last position is in another process's part"
        )
    if model_kwargs.get("position_ids") is None:
        raise ValueError(
            "position_ids should be given with sequence_parallel: a model counts the positions of "
            "each part from 0"
        )


def preference_batch(batch: Mapping[str, Any], resolved: ResolvedObjective) -> PreferenceBatch:
    """Takes apart what a collator made, in TRL's names, for an objective of whatever layout.

    Raises:
        ValueError: naming the key that is missing, superfluous or of the wrong shape.
    """
    tokens, rest = take_tokens(batch)
    count = tokens.num_sequences
    name = "input_ids" if isinstance(tokens, Tokens) else "row_lengths"
    checks.sequence_count(count, resolved, None, name=f"batch[{name!r}]")
    row_index = rest.pop("row_index", None)
    keys = reference_keys(resolved)
    reference = _take_reference(rest, keys, count // len(keys))
    for key in rest:  # the models' forward would take it without a word
        if key.startswith(("ref_", "reference_")) or "logps" in key:
            raise ValueError(f"batch should have its reference under {list(keys)}, got {key!r}")
    return PreferenceBatch(tokens, reference, row_index, rest)


def take_tokens(batch: Mapping[str, Any]) -> tuple[Tokens | PackedTokens, dict[str, Any]]:
    """The tokens of a batch, and everything else in it.

    Raises:
        ValueError: naming the key that is missing, superfluous or of the wrong shape.
    """
    rest = dict(batch)
    packed = PackedTokens.take(rest)
    return _take_tokens(rest) if packed is None else packed, rest


def take_options(
    batch: Mapping[str, Any], given: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rest of a batch, and the objective's options that a collator put into it.

    Raises:
        ValueError: one of them is an argument as well.
    """
    rest = dict(batch)
    found = {key: rest.pop(key) for key in _OPTIONS if rest.get(key) is not None}
    for key in found:
        if key in given:
            raise ValueError(f"{key} should be given in the batch or as an argument, got both")
    return rest, found


def with_row_index(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with `row_index` [N] int64: the positions that predict a token with loss.

    For a collator. On the CPU they cost nothing; found on a GPU, the host waits for the device once
    a step.

    Raises:
        ValueError: naming the key that is missing or of the wrong shape.
    """
    shifted = _take_tokens(dict(batch)).shifted
    row_index = (shifted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    return {**batch, "row_index": row_index}


def _take_tokens(rest: dict[str, Any]) -> Tokens:
    """The tokens, taken out of `rest`."""
    if "input_ids" not in rest:
        raise ValueError(f"batch should have the key 'input_ids', got {sorted(rest)}")
    input_ids, attention_mask = rest.pop("input_ids"), rest.pop("attention_mask", None)
    keys = ("labels", "completion_mask", "shift_labels")
    values = {key: rest.pop(key, None) for key in keys}
    given = [key for key in keys if values[key] is not None]
    if len(given) != 1:
        raise ValueError(
            "batch should have one of the keys 'labels', 'completion_mask' and 'shift_labels', "
            f"got {given or 'none'}"
        )
    labels, completion_mask, shift_labels = values.values()
    if completion_mask is not None:
        _check_shapes(input_ids, {"completion_mask": completion_mask})
        labels = torch.where(completion_mask.bool(), input_ids, IGNORE_INDEX)
    return Tokens.of(input_ids, labels, shift_labels, attention_mask)


def _take_reference(rest: dict[str, Any], keys: tuple[str, ...], count: int) -> Tensor | None:
    values = {key: rest.pop(key, None) for key in keys}
    missing = [key for key, value in values.items() if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise ValueError(
            f"batch has precomputed reference log-probabilities, but no {missing[0]!r}"
        )
    for key, value in values.items():
        if not isinstance(value, Tensor) or value.shape != (count,):
            shape = getattr(value, "shape", type(value).__name__)
            raise ValueError(f"batch[{key!r}] should have shape ({count},), got {shape}")
    return torch.cat(list(values.values()))
