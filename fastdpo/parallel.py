"""Several processes that share a vocabulary, a sequence, or a model's parameters: the public names
of `distributed`.
"""

from .distributed.head import call_head
from .distributed.sequence import SequenceParallel
from .distributed.vocabulary import VocabParallel

__all__ = ["SequenceParallel", "VocabParallel", "call_head"]
