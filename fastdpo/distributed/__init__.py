"""Several processes that share a vocabulary, a sequence, or a model's parameters. Users know it as
`fastdpo.parallel`.

- `vocabulary`: under tensor parallelism each process holds rows of the lm_head
- `sequence`: under sequence or context parallelism each holds tokens of every sequence
- `head`: an lm_head whose parameters are gathered around its call; `exact`: what leaves it
- `dtensors`: hidden states and heads that are DTensors
- `groups`: what processes exchange, and in which order it is added up
"""

from .head import call_head
from .sequence import SequenceParallel
from .vocabulary import VocabParallel

__all__ = ["SequenceParallel", "VocabParallel", "call_head"]
