"""An lm_head that data parallelism shards by rows and that stays so: the rows of hidden states that
carry loss travel, and the weight does not.

Process r has N_r rows and V_r entries of the vocabulary. Hidden states and labels of all
M = Σ N_r rows are gathered, the vocabulary is shared over them (`vocabulary`), each process takes
the log-probabilities of its own rows, and their gradients are gathered. So each process has, of
L = Σ_r L_r,

    ∂L/∂weight    of its own V_r entries, from all M rows: over P it is what FSDP's mean is
    ∂L/∂hidden    V_r's part of all M rows: a reduce-scatter in the accumulate dtype brings each
                  process the sum of its own

The weight is whole nowhere, nor is its gradient, and processes with few rows share the work of the
others. What is sent, and the number of rows up to which it is less than the weight, is in
`benchmarks/scaling.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .dtensors import is_dtensor, spread_over
from .groups import GROUPS, gathered, gathered_rows, known, scattered_sum
from .vocabulary import VocabParallel


@dataclass(frozen=True)
class ShardedHead:
    """How the rows of an lm_head are spread over processes that have different sequences.

    Make it with `ShardedHead.of` (a parameter that fully_shard made a DTensor) or
    `ShardedHead.over`, once, and pass it as `sharded_head`.
    """

    vocabulary: VocabParallel
    replicas: str | None = None  # the group of those that hold the same rows
    num_replicas: int = 1

    @classmethod
    def of(cls, weight: Tensor) -> ShardedHead:
        """Of a weight that is a DTensor; nothing is communicated.

        Args:
            weight: [V, D] placed Shard(0) on a mesh of one dimension, or (Replicate(), Shard(0)) on
                one of two (HSDP).

        Raises:
            ValueError: where it is placed in another way, or a process has no rows.
        """
        if not is_dtensor(weight) or weight.dim() != 2:
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            _fail("weight", "a DTensor [V, D], as fully_shard makes them", f"{got}")
        mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
        replicated = len(placements) == 2 and placements[0].is_replicate()
        if not placements[-1].is_shard(0) or len(placements) != 1 + replicated:
            should = "placed Shard(0), or (Replicate(), Shard(0))"
            _fail("weight", should, f"{placements}")
        spread = spread_over(mesh, weight, dim=len(placements) - 1)
        if not replicated:
            return cls(spread)
        return cls(spread, known(mesh.get_group(0)).group_name, mesh.size(0))

    @classmethod
    def over(
        cls,
        weight: Tensor,  # [V_r, D]
        group: dist.ProcessGroup | None = None,
    ) -> ShardedHead:
        """Every process of the group calls it, each with its own rows of the lm_head.

        Args:
            weight: [V_r, D] this process's rows, plain; process r's first is entry
                V_0 + … + V_{r−1} of the vocabulary. The numbers of rows may differ.
            group: the data-parallel processes that share the head; None: all of them.

        Raises:
            ValueError: where `weight` is no matrix with rows, or torch.distributed has not been
                initialised.
        """
        return cls(VocabParallel.over(weight, group))

    @property
    def group(self) -> dist.ProcessGroup:
        return GROUPS[self.vocabulary.group]

    @property
    def size(self) -> int:
        return len(self.vocabulary.sizes)

    def local(self, name: str, value: Any) -> Any:
        """This process's rows of a head that is a DTensor; what is plain is taken as these.

        Raises:
            ValueError: they are spread in another way.
        """
        if not is_dtensor(value):
            return value
        spread = value.placements[-1].is_shard(0) and all(
            p.is_replicate() for p in value.placements[:-1]
        )
        rows = value.to_local()
        mine = self.vocabulary.sizes[self.vocabulary.rank]
        if not spread or value.shape[0] != self.vocabulary.vocab_size or rows.shape[0] != mine:
            should = f"spread as sharded_head says, {self.vocabulary.sizes} rows"
            _fail(name, should, f"{list(value.shape)} placed {value.placements}")
        return rows

    def exchange(self, labels: Tensor) -> Exchange:  # [N_r] of the rows that carry loss
        """Every process's labels. The numbers of rows are read back: one wait for a GPU."""
        own = torch.tensor([labels.shape[0]], device=labels.device)
        counts = torch.cat(gathered(own, self.group)).tolist()
        shared = self.vocabulary
        owners = Owners(shared.sizes, shared.rank, shared.group, counts=tuple(counts))
        return Exchange(owners, owners.gathered(labels))

    def mean(self, grad: Tensor) -> Tensor:
        """Of the gradient of this process's rows: what all processes found for them, over their
        number.
        """
        grad = grad / (self.size * self.num_replicas)
        if self.replicas is not None:
            dist.all_reduce(grad, group=GROUPS[self.replicas])
        return grad


@dataclass(frozen=True)
class Exchange:
    """Rows of all processes that carry loss, in the processes' order."""

    owners: Owners
    labels: Tensor  # [M]


@dataclass(frozen=True)
class Owners(VocabParallel):
    """A shared vocabulary over rows that belong to processes."""

    counts: tuple[int, ...] = ()  # N_r of every process

    def __post_init__(self) -> None:  # of one call: not to be found by its name
        object.__setattr__(self, "name", "")

    @property
    def own(self) -> slice:
        """This process's rows among all."""
        first = sum(self.counts[: self.rank])
        return slice(first, first + self.counts[self.rank])

    @property
    def most(self) -> int:
        return max(self.counts)

    def gathered(self, values: Tensor) -> Tensor:  # [N_r, ...] -> [M, ...]
        """Of every process. As many rows are sent by each, those of the largest."""
        if self.most == 0:
            return values
        whole = gathered_rows(_padded(values, self.most), GROUPS[self.group])
        if min(self.counts) == self.most:
            return whole
        parts = zip(whole.split(self.most), self.counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def hidden_grad(self, part: Tensor) -> Tensor:  # [M, D], in the accumulate dtype
        """The sum over the processes, for this process's rows; the others are not meant."""
        if part.numel() == 0:
            return part
        if min(self.counts) == self.most:
            parts = part
        else:
            blocks = part.split(self.counts)
            parts = torch.cat([_padded(block, self.most) for block in blocks])
        mine = scattered_sum(parts, GROUPS[self.group])
        part[self.own] = mine[: self.counts[self.rank]]
        return part


def rows_move_less(
    rows: int,
    shape: Sequence[int],
    processes: int,
    *,
    reference: bool = True,
    dtype_bytes: int = 2,
    reduce_bytes: int = 4,
) -> bool:
    """Whether a step sends fewer bytes with a head that stays sharded (`sharded_head`) than with
    one that is gathered for the policy's forward, its backward and the reference's forward:

        M < V·D·(3b + b_r) / (D·(2b + 4) + 12 + 24·G)

    (1.25 V for 16-bit weights, gradients reduced in fp32, and few processes); equation (4) of
    `benchmarks/scaling.py`. Each process then holds M rows, and never the whole weight.

    Args:
        rows: M, that carry loss, over all processes of the group. Every process has to decide
            alike: give a number that is the same on all.
        shape: (V, D) of the lm_head's weight.
        processes: G, that share the head.
        reference: whether the reference's hidden states are scored in the same step.
        dtype_bytes: b, of an element of hidden states and weights.
        reduce_bytes: b_r, of an element of the weight's gradient as it is reduced.

    Raises:
        ValueError: naming the argument that is not a positive number (rows may be 0).
    """
    given = {"processes": processes, "dtype_bytes": dtype_bytes, "reduce_bytes": reduce_bytes}
    for name, value in {"rows": rows, **given}.items():
        least = 0 if name == "rows" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _fail(name, f"an int >= {least}", repr(value))
    if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        _fail("shape", "two positive numbers, (V, D)", f"{tuple(shape)}")
    vocab, width = shape
    models = 1 + bool(reference)
    weight = vocab * width * ((1 + models) * dtype_bytes + reduce_bytes)
    return rows * (width * (models * dtype_bytes + 4) + 12 + 12 * models * processes) < weight


def _padded(values: Tensor, count: int) -> Tensor:  # [N, ...] -> [count, ...]
    missing = count - values.shape[0]
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])


def _fail(argument: str, should: str, got: str) -> NoReturn:
    raise ValueError(f"{argument} should be {should}, got {got}")
