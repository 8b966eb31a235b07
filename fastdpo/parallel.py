"""Several processes that share a vocabulary or a sequence: the public names of `distributed`."""

from .distributed.sequence import SequenceParallel
from .distributed.vocabulary import VocabParallel

__all__ = ["SequenceParallel", "VocabParallel"]
