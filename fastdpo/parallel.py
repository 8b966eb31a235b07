"""The public names of `distributed`: processes that share a vocabulary, a sequence, a batch, or a
model's parameters.
"""

from .distributed.data import DataParallel, batch_counts
from .distributed.head import call_head
from .distributed.sequence import SequenceParallel
from .distributed.vocabulary import VocabParallel

__all__ = ["DataParallel", "SequenceParallel", "VocabParallel", "batch_counts", "call_head"]
