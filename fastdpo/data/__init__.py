"""Preference data: token ids, batches of them, and the reference's log-probabilities.

PairCollator    examples to a batch: padded, packed, or with shared prompts
truncate        a prompt and its answers to a length
"""

from .collator import PairCollator
from .truncation import truncate

__all__ = ["PairCollator", "truncate"]
