"""The options of a call, each listed once: checked by public functions, and handed down whole."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..backends.contract import Head
from ..distributed.data import DataParallel
from ..distributed.sequence import SequenceParallel
from ..distributed.sharded import ShardedHead
from ..distributed.vocabulary import VocabParallel, vocabulary
from ..objectives import ResolvedObjective

STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class Call:
    """How hidden states become token log-probabilities."""

    stats: tuple[str, ...] = ()  # among STATS
    workspace_bytes: int | None = None  # None: the default of `fastdpo.backends.workspace`
    backend: str | None = None  # None: the environment variable, else automatic
    compute_dtype: torch.dtype | None = None  # hidden and head are cast to it; None: as they are
    vocab_parallel: VocabParallel | None = None
    sharded_head: ShardedHead | None = None

    def local(self, labels: Tensor) -> Tensor:  # [N] -> [N]
        """Labels as entries of this process's part of the vocabulary."""
        return labels if self.vocab_parallel is None else self.vocab_parallel.local(labels)

    def vocab_size(self, head: Head) -> int:
        """Entries of the whole vocabulary."""
        shared = self.vocab_parallel
        if self.sharded_head is not None:
            shared = self.sharded_head.vocabulary
        return head.vocab_size if shared is None else shared.vocab_size

    def to_text(self) -> str:
        """For operators, which take no objects; a tracer folds it into a constant."""
        shared = self.vocab_parallel
        assert self.sharded_head is None  # never traced
        values = (
            self.stats,
            self.workspace_bytes,
            self.backend,
            None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch."),
            None if shared is None else shared.name,
        )
        return repr(values)

    @classmethod
    def from_text(cls, text: str) -> Call:
        stats, workspace_bytes, backend, dtype, shared = ast.literal_eval(text)
        dtype = None if dtype is None else getattr(torch, dtype)
        return cls(stats, workspace_bytes, backend, dtype, vocabulary(shared))


assert len(fields(Call)) == 6  # what `to_text` writes, and sharded_head


@dataclass(frozen=True)
class Normalization:
    """What means over pairs and tokens are divided by, where a batch is shared by processes or cut
    into micro-batches (`distributed.data`).
    """

    num_pairs: float | Tensor | None = None  # of the global batch; None: to be counted
    num_tokens: float | Tensor | None = None  # of the chosen answers
    data_parallel: DataParallel | None = None

    def counted(
        self,
        pairs: int,  # of this call
        tokens: Tensor | None,  # [] of this call; None where no term divides by it
        lengths: Tensor,  # for its device
    ) -> tuple[float | Tensor, float | Tensor]:
        """(num_pairs, num_tokens), at least 1 each."""
        num_pairs, num_tokens = self.num_pairs, self.num_tokens
        if num_pairs is None:
            assert self.data_parallel is not None
            here = lengths.new_full((), pairs)
            counts = torch.stack([here, here if tokens is None else tokens])
            num_pairs, num_tokens = self.data_parallel.total(counts).unbind()
        return _at_least_1(num_pairs), 1.0 if num_tokens is None else _at_least_1(num_tokens)

    @property
    def factor(self) -> int:
        """What the mean of gradients over the processes divides by."""
        return 1 if self.data_parallel is None else self.data_parallel.size


def _at_least_1(count: float | Tensor) -> float | Tensor:
    if isinstance(count, Tensor):
        return count.detach().reshape(()).clamp(min=1)
    return max(1.0, float(count))


@dataclass(frozen=True)
class LossCall:
    """How token log-probabilities become a preference loss."""

    objective: ResolvedObjective
    average: bool = False  # divide each sequence's log-probability by its number of tokens
    pairs: str = "concatenated"  # among `objectives.PAIRS`
    cu_seqlens: Tensor | None = None  # [S + 1], of a packed batch
    sequence_parallel: SequenceParallel | None = None
    normalization: Normalization | None = None  # None: means over the pairs and tokens of the call

    def stats(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """What is asked for about the tokens, and what the objective reads beside it."""
        beside = self.objective.wpo and "log_sum_sq_probs" not in asked
        return (*asked, "log_sum_sq_probs") if beside else asked
