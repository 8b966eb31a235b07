"""Batches that several processes share: means over pairs and over tokens of all of them.

Data parallelism averages gradients over P processes. Where process r has Σ_r and n_r, the mean of
the local means Σ_r / n_r is the global mean Σ_r Σ_r / Σ_r n_r only for equal n_r; so each loss is

    P · Σ_r / n        n = Σ_r n_r over all processes and accumulated micro-batches

whose mean over the processes, summed over micro-batches, is the global mean, and so are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..names import ops
from .groups import known


@dataclass(frozen=True)
class DataParallel:
    """The processes whose gradients are averaged (DDP, FSDP, ZeRO), each with its own share of a
    batch. Make it with `DataParallel.over`.
    """

    group: str
    size: int

    @classmethod
    def over(cls, group: dist.ProcessGroup | None = None) -> DataParallel:
        """Processes with different pairs (None: all of them): those over which the wrapper takes
        the mean of gradients.

        Raises:
            ValueError: where torch.distributed has not been initialised.
        """
        group = known(group)
        return cls(group.group_name, dist.get_world_size(group))

    def total(self, values: Tensor) -> Tensor:
        """Σ over the processes, of counts."""
        return ops.total(values, self.group)


def batch_counts(
    labels: Sequence[Tensor],  # [2B, T] each
    data_parallel: DataParallel | None = None,
    *,
    ignore_index: int = -100,
    pairs: str = "concatenated",
) -> dict[str, Tensor]:
    """`num_pairs` and `num_tokens` of `linear_dpo_loss`, of a global batch of pairs.

    Args:
        labels: [2B, T] each, aligned with hidden states as the losses take them: of all the
            micro-batches of this process that one optimizer step is made of.
        data_parallel: the processes that share the batch, all of which call; None: this one alone.
        ignore_index: the label of positions that carry no loss.
        pairs: "concatenated" (first half chosen) or "interleaved" (even rows chosen).

    Returns:
        The number of pairs and the number of the chosen answers' tokens that carry loss, [] int64
        each, on the labels' device; nothing waits for it. Keyword arguments of `linear_dpo_loss`.

    Raises:
        ValueError: naming the argument.
    """
    if pairs not in ("concatenated", "interleaved"):
        _fail("pairs", "one of ['concatenated', 'interleaved']", repr(pairs))
    if data_parallel is not None and not isinstance(data_parallel, DataParallel):
        should = "a fastdpo.parallel.DataParallel or None"
        _fail("data_parallel", should, type(data_parallel).__name__)
    if isinstance(labels, Tensor) or len(labels) == 0:
        _fail("labels", "a list of at least one tensor", type(labels).__name__)
    for value in labels:
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] % 2:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            _fail("labels", "of shape [2B, T] each", f"{shape}")
    count = sum(value.shape[0] // 2 for value in labels)
    chosen = [v[::2] if pairs == "interleaved" else v[: v.shape[0] // 2] for v in labels]
    tokens = torch.stack([(value != ignore_index).sum() for value in chosen]).sum()
    counts = torch.stack([torch.full_like(tokens, count), tokens])
    counts = counts if data_parallel is None else data_parallel.total(counts)
    return {"num_pairs": counts[0], "num_tokens": counts[1]}


def _fail(argument: str, should: str, got: str) -> NoReturn:
    raise ValueError(f"{argument} should be {should}, got {got}")
