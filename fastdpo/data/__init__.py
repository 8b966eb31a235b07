"""Preference data: from rows of text or messages to batches of token ids.

prepare              a data set in any of TRL's preference formats to prompt_ids, chosen_ids,
                     rejected_ids
PairCollator         examples of these to a batch: padded, packed, or with shared prompts
RankingCollator      the same of K answers to a prompt
CompletionCollator   the same of single answers
TokenBudgetSampler   which examples make a batch: as many as fill a budget of tokens
micro_batches        a step's examples in parts to such a budget
truncate             a prompt and its answers to a length
"""

from .collator import CompletionCollator, PairCollator, RankingCollator
from .prepare import prepare
from .sampler import TokenBudgetSampler, micro_batches
from .truncation import truncate

__all__ = [
    "CompletionCollator",
    "PairCollator",
    "RankingCollator",
    "TokenBudgetSampler",
    "micro_batches",
    "prepare",
    "truncate",
]
