"""Several processes that share a vocabulary or a sequence: the public names of `distributed`."""

from fastdpo.distributed.sequence import SequenceParallel
from fastdpo.distributed.vocabulary import VocabParallel

__all__ = ["SequenceParallel", "VocabParallel"]
