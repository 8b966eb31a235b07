"""Which positions carry loss, and whose sequence they are: found once, for policy, reference and
backward.

Prompt, padding and ignored positions are left out before any matrix product: everything below sees
N rows that all carry loss, in the order of the flattened labels. Their number is the one value that
is read back from a GPU, and the check of the labels rides along.

While a tracer records (`core.autograd`) their number is not known. `Rows` is then deferred: all M
positions are rows, the operators of `core.operator` select those that carry loss when they run, and
`carries` tells them apart until then.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.sharded import Exchange
from ..names import NAMESPACE, ops
from . import checks
from .autograd import is_traced
from .sequences import Segments


@dataclass(frozen=True)
class Rows:
    """The N of M positions that carry loss; while deferred, N stands for M."""

    labels: Tensor  # [N]
    index: Tensor | None  # [N] positions among the M, ascending; None where all of them carry loss
    shape: torch.Size  # of all labels, M in number
    vocab_size: int  # that the labels were checked against
    carries: Tensor | None = None  # of that shape, bool; None where no sequence is asked for
    count: Tensor | None = None  # [] int64 on the CPU, while deferred: how many of index to take
    exchange: Exchange | None = None  # everyone's rows, under a head that stays sharded

    @property
    def deferred(self) -> bool:
        return self.count is not None

    def gather(self, values: Tensor) -> Tensor:  # [M, ...] -> [N, ...]
        if self.deferred or self.index is None:
            return values
        return values.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:  # [N, ...] -> [M, ...], zeros elsewhere
        if self.deferred or self.index is None:
            return values
        zeros = values.new_zeros(self.shape.numel(), *values.shape[1:])
        return zeros.index_copy_(0, self.index, values)

    def at_labels(self, values: Tensor) -> Tensor:  # [N] -> shaped like the labels
        return self.scatter(values).view(self.shape)

    def padded(self) -> Rows:
        """The same, deferred: no shape depends on how many there are, so that a compiled graph
        which takes them is compiled once.
        """
        if self.deferred:
            return self
        labels = self.at_labels(self.labels)
        index = labels.new_zeros(self.shape.numel(), dtype=torch.int64)
        if self.index is not None:
            index[: len(self.index)] = self.index
        count = torch.tensor(len(self.labels), device="cpu")
        return dataclasses.replace(self, labels=labels.flatten(), index=index, count=count)

    def to(self, device: torch.device) -> Rows:
        if self.labels.device == device:
            return self
        index, carries = (None if t is None else t.to(device) for t in (self.index, self.carries))
        labels = self.labels.to(device)
        return dataclasses.replace(self, labels=labels, index=index, carries=carries)

    def lengths(self) -> Tensor:  # [S]
        """How many positions of each sequence carry loss."""
        assert self.carries is not None
        return self.carries.sum(-1)

    def segments(
        self,
        cu_seqlens: Tensor | None,  # [S + 1], of a packed batch
    ) -> Segments:
        """Which of the rows belong to which sequence."""
        assert self.carries is not None
        lengths, positions = _lengths(self.carries, cu_seqlens)
        if self.deferred:
            return Segments(positions, lengths, self.carries.flatten())
        return Segments(lengths, lengths)


def find(
    labels: Tensor,  # [...]
    ignore_index: int,
    vocab_size: int,
    row_index: Tensor | Rows | None = None,  # [N] positions among the flattened, if known
) -> Rows:
    """The rows that carry loss. On a GPU this waits for the device once, for their number and for
    whether every label is in range; with `row_index` it waits for nothing, and a label out of range
    trips a device-side assertion. Rows that were found before are taken as they are.

    Raises:
        ValueError: a label is neither in [0, V) nor `ignore_index`, or row_index is not what it
            should be. While a tracer records, this is raised when the graph runs.
    """
    if isinstance(row_index, Rows):
        assert row_index.shape == labels.shape
        if row_index.vocab_size == vocab_size:
            return row_index
        # A reference had another vocabulary: the same positions, to be held to this one as well.
        assert row_index.carries is not None
        labels = torch.where(row_index.carries, labels, ignore_index)
        row_index = None
    checks.ignored(ignore_index)
    flat = labels.flatten()
    if row_index is not None:
        checks.row_index(row_index, flat)
    if is_traced(labels):
        index, count = ops.rows(flat, ignore_index, vocab_size, row_index)
        carries = labels != ignore_index if row_index is None else _marked(labels, row_index)
        return Rows(flat, index, labels.shape, vocab_size, carries, count)
    if row_index is not None:
        picked = flat.index_select(0, row_index)
        checks.picked_labels(picked, vocab_size)
        return Rows(picked, row_index, labels.shape, vocab_size, _marked(labels, row_index))
    carries, number = checks.label_values(labels, ignore_index, vocab_size)
    if number == flat.numel():
        return Rows(flat, None, labels.shape, vocab_size, carries)
    index = torch.nonzero_static(carries.flatten(), size=number).squeeze(1)
    return Rows(flat.index_select(0, index), index, labels.shape, vocab_size, carries)


def every_label(
    labels: Tensor,  # [N]
    vocab_size: int,
) -> Rows:
    """Rows that were picked before: all of them carry loss. Nothing waits for a GPU.

    Raises:
        ValueError: a label is not in [0, V).
    """
    checks.picked_labels(labels, vocab_size)
    carries = torch.ones_like(labels, dtype=torch.bool)
    return Rows(labels, None, labels.shape, vocab_size, carries)


def _marked(labels: Tensor, row_index: Tensor) -> Tensor:  # [...], [N] -> [...] bool
    carries = labels.new_zeros(labels.numel(), dtype=torch.bool).index_fill(0, row_index, True)
    return carries.view(labels.shape)


def every_row(
    labels: Tensor,  # [...], negative where a row carries no loss
    cu_seqlens: Tensor | None,  # [S + 1]
) -> Segments:
    """Which of all M positions belong to which sequence, for logits that exist already."""
    carries = labels >= 0
    lengths, positions = _lengths(carries, cu_seqlens)
    return Segments(positions, lengths, carries.flatten())


def _lengths(
    carries: Tensor,  # [S, T] or [M], bool
    cu_seqlens: Tensor | None,  # [S + 1]
) -> tuple[Tensor, Tensor]:  # [S], [S]
    """Of each sequence: how many positions carry loss, and how many there are."""
    if cu_seqlens is None:
        lengths = carries.sum(-1)
        return lengths, torch.full_like(lengths, carries.shape[1])
    ends = cu_seqlens.long()
    before = torch.nn.functional.pad(carries.cumsum(0), (1, 0))
    return before[ends].diff(), ends.diff()


# ---- For tracers: the same, with outputs whose shapes follow from the labels'


@torch.library.custom_op(f"{NAMESPACE}::rows", mutates_args=())
def _find(
    labels: Tensor, ignore_index: int, vocab_size: int, row_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(index, count) of deferred `Rows`: the positions that carry loss come first in index."""
    found = find(labels, ignore_index, vocab_size, row_index)
    count = torch.tensor(found.labels.shape[0], device="cpu")
    if row_index is not None:
        return row_index.clone(), count
    index = torch.zeros_like(labels)
    if found.index is not None:
        index[: found.index.shape[0]] = found.index
    return index, count


@_find.register_fake
def _(labels, ignore_index, vocab_size, row_index):
    index = torch.empty_like(labels if row_index is None else row_index)
    return index, torch.empty((), dtype=torch.int64, device="cpu")


def selected(
    labels: Tensor,  # [M]
    index: Tensor,  # [M] or [N]
    count: Tensor,  # []
    vocab_size: int,
) -> Rows:
    """Deferred rows, found: what an operator makes of its arguments."""
    n = int(count)
    if n == labels.shape[0]:
        return Rows(labels, None, labels.shape, vocab_size)
    return Rows(labels.index_select(0, index[:n]), index[:n], labels.shape, vocab_size)
