"""The public names of `distributed`: processes that share a vocabulary, a sequence, a batch, or a
model's parameters.
"""

from .distributed.data import DataParallel, batch_counts
from .distributed.head import call_head
from .distributed.sequence import SequenceParallel
from .distributed.sharded import ShardedHead, rows_move_less
from .distributed.vocabulary import VocabParallel

__all__ = [
    "DataParallel",
    "SequenceParallel",
    "ShardedHead",
    "VocabParallel",
    "batch_counts",
    "call_head",
    "rows_move_less",
]
