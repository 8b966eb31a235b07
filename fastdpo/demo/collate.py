"""Pairs to token ids to batches, in TRL's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import PairCollator, prepare
from ..data.prepare import RowError
from .model import PLAIN_TEMPLATE
from .options import InputError
from .pairs import Pair

Batch = dict[str, Tensor]


@dataclass
class Example:
    """One pair as token ids, and what the reference thinks of it once it was asked."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    flaw: str = ""
    good: frozenset[str] = frozenset()
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None


def encode_all(pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> list[Example]:
    """Pairs of whose answers truncation to max_length leaves nothing are dropped, with a warning.

    Raises:
        InputError: naming the file and line of a pair that cannot be used, or too few are left.
    """
    rows = [
        {
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "flaw": pair.flaw,
            "good": pair.good,
        }
        for pair in pairs
    ]
    try:
        prepared = prepare(
            rows,
            tokenizer,
            max_length=max_length,
            too_long="drop",
            chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
            keep_columns=("flaw", "good"),
        )
    except RowError as error:
        raise InputError(f"{pairs[error.row].where}: {error.reason}") from None
    if len(prepared) < 2:
        raise InputError(
            f"--max-length {max_length} leaves {len(prepared)} pairs with a prompt and two answers"
        )
    return [Example(**row) for row in prepared]


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device) -> Batch:
    """Chosen sequences first, then rejected ones, padded on the right."""
    batch = PairCollator(pad_token_id)([vars(example) for example in examples])
    return {key: value.to(device) for key, value in batch.items()}


def labels_of(batch: Batch) -> Tensor:  # [2B, T]
    """Hugging Face labels: the answers' tokens, -100 elsewhere."""
    return torch.where(batch["completion_mask"].bool(), batch["input_ids"], -100)
