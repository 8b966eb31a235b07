"""Several processes that share a vocabulary, a sequence, or a model's parameters. Users know it as
`fastdpo.parallel`.

- `vocabulary`: under tensor parallelism each process holds rows of the lm_head
- `sequence`: under sequence or context parallelism each holds tokens of every sequence
- `data`: under data parallelism each holds other pairs of a batch
- `head`: an lm_head whose parameters are gathered around its call; `exact`: what leaves it
- `sharded`: under data parallelism each holds rows of the lm_head, which stays so
- `dtensors`: hidden states and heads that are DTensors
- `groups`: what processes exchange, and in which order it is added up
"""

from .data import DataParallel, batch_counts
from .head import call_head
from .sequence import SequenceParallel
from .sharded import ShardedHead, rows_move_less
from .vocabulary import VocabParallel

__all__ = [
    "DataParallel",
    "SequenceParallel",
    "ShardedHead",
    "VocabParallel",
    "batch_counts",
    "call_head",
    "rows_move_less",
]
