"""Sequences that several processes share.

Under sequence (or context) parallelism each process holds some tokens of every
sequence: the sequences' log-probabilities and lengths are sums over the processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..names import NAMESPACE, ops
from .groups import GROUPS, known, ordered_sum


@dataclass(frozen=True)
class SequenceParallel:
    """The processes that hold the tokens of the same sequences. Make it with
    `SequenceParallel.over`.
    """

    group: str

    @classmethod
    def over(cls, group: dist.ProcessGroup | None = None) -> SequenceParallel:
        """Processes that each hold some tokens of every sequence (None: all of them).

        Every process then gets the same loss, and gradients for its own tokens alone: what they
        share (the weights) takes the sum over the group of its gradients, where data parallelism
        would take the mean.

        Raises:
            ValueError: where torch.distributed has not been initialised.
        """
        return cls(known(group).group_name)

    def total(self, values: Tensor) -> Tensor:
        """Σ over the processes, in their order; its gradient is each process's own."""
        return ops.total(values, self.group)


@torch.library.custom_op(f"{NAMESPACE}::total", mutates_args=())
def _total(values: Tensor, group: str) -> Tensor:
    return ordered_sum(values, GROUPS[group])


@_total.register_fake
def _(values: Tensor, group: str) -> Tensor:
    return torch.empty_like(values)


# Every process computes the same loss from the total, so its own part's gradient is the total's.
torch.library.register_autograd(f"{NAMESPACE}::total", lambda ctx, grad: (grad, None))
