"""Preference data: from rows of text or messages to batches of token ids.

prepare              a data set in any of TRL's preference formats to prompt_ids, chosen_ids,
                     rejected_ids
PairCollator         examples of these to a batch: padded, packed, or with shared prompts
RankingCollator      the same of K answers to a prompt
CompletionCollator   the same of single answers
TokenBudgetSampler   which examples make a batch: as many as fill a budget of tokens
micro_batches        a step's examples in parts to such a budget
truncate             a prompt and its answers to a length
reference_logps      a reference's log-probabilities of a data set, once; load_reference reads
                     them, reference_batches says in which batches they were computed
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .collator import CompletionCollator, PairCollator, RankingCollator
from .prepare import prepare
from .sampler import TokenBudgetSampler, micro_batches
from .truncation import truncate

if TYPE_CHECKING:
    from .reference import load_reference, reference_batches, reference_logps

__all__ = [
    "CompletionCollator",
    "PairCollator",
    "RankingCollator",
    "TokenBudgetSampler",
    "load_reference",
    "micro_batches",
    "prepare",
    "reference_batches",
    "reference_logps",
    "truncate",
]

# They need models, and models need layouts from here.
_REFERENCE = ("load_reference", "reference_batches", "reference_logps")


def __getattr__(name: str) -> object:
    if name not in _REFERENCE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(".reference", __name__), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
