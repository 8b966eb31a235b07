"""Labels to rows: which positions carry loss, and which sequence each of them belongs to.

Prompt, padding and ignored positions are left out before any matrix product (DESIGN 2.1).
Everything below this module sees N rows that all carry loss, in the order of the flattened labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The N of M positions that carry loss."""

    labels: Tensor  # [N]
    index: Tensor | None  # [N] positions among the M, ascending; None where all of them carry loss
    total: int  # M

    def gather(self, values: Tensor) -> Tensor:  # [M, ...] -> [N, ...]
        return values if self.index is None else values.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:  # [N, ...] -> [M, ...], zeros elsewhere
        if self.index is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.index, values)


def count(
    labels: Tensor,  # [M]
    ignore_index: int,
    vocab_size: int,
) -> tuple[int, int]:
    """(rows that carry loss, labels among them outside [0, vocab_size)): the one host
    synchronisation.
    """
    carries = labels != ignore_index
    outside = carries & ((labels < 0) | (labels >= vocab_size))
    carrying, bad = torch.stack([carries.sum(), outside.sum()]).tolist()
    return carrying, bad


def select(
    labels: Tensor,  # [M]
    ignore_index: int,
    carrying: int,
) -> Rows:
    """The rows that carry loss; `carrying` is their number, so that nothing waits for the
    device.
    """
    total = labels.numel()
    if carrying == total:
        return Rows(labels, None, total)
    carries = labels != ignore_index
    index = torch.nonzero_static(carries, size=carrying).squeeze(1)
    return Rows(labels.index_select(0, index), index, total)


def lengths_padded(
    carries: Tensor,  # [S, T] bool
) -> Tensor:  # [S]
    """Rows that carry loss in each sequence of a padded batch."""
    return carries.sum(-1)


def lengths_packed(
    carries: Tensor,  # [M] bool
    cu_seqlens: Tensor,  # [S + 1]
) -> Tensor:  # [S]
    """Rows that carry loss in each sequence of a packed batch."""
    before = torch.nn.functional.pad(carries.cumsum(0), (1, 0))
    return before[cu_seqlens.long()].diff()
