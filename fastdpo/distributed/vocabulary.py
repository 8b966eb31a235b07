"""A vocabulary that several processes share.

Under tensor parallelism each process holds V_r consecutive rows of the lm_head.
The primitives do not notice: a label outside [0, V_r) lies in another tile of the vocabulary, here
in another process. With α the largest of the anchors α_r that the processes used, and S_r and T_r
their sums of e and of e · (z − α_r),

    a = Σ_r a_r (0 but where the label is)      S = Σ_r w_r S_r       w_r = exp(α_r − α)
    T = Σ_r w_r (T_r + (α_r − α) S_r)           E_r := w_r E_r

hold for the whole vocabulary: a few numbers per row are exchanged, never logits, and equations (1)
to (6) of `fastdpo.core.linear` go on as they are. The gradient of the weight stays where its rows
are; that of hidden is a sum over the processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.contract import ExpSums
from .groups import GROUPS, gathered, in_order, known, ordered_sum

_VOCABULARIES: dict[str, VocabParallel] = {}


@dataclass(frozen=True)
class VocabParallel:
    """How the rows of an lm_head are spread over the processes of a group, in their order.

    Make it with `VocabParallel.over` (or `of`), once, and pass it as `vocab_parallel`.
    """

    sizes: tuple[int, ...]  # V_r of every process
    rank: int  # this process's place among them
    group: str
    reduce_hidden_grad: bool = True
    name: str = field(init=False)

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(
                f"group should be known: make it with `over` or `of`, got {self.group!r}"
            )
        name = f"{self.group}/{self.rank} of {self.sizes}, {self.reduce_hidden_grad}"
        object.__setattr__(self, "name", name)
        _VOCABULARIES[name] = self

    @classmethod
    def over(
        cls,
        weight: Tensor,  # [V_r, D]
        group: dist.ProcessGroup | None = None,
        *,
        reduce_hidden_grad: bool = True,
    ) -> VocabParallel:
        """Every process of the group calls it, each with its own rows of the lm_head.

        Args:
            weight: [V_r, D] this process's rows; process r's first is entry V_0 + … + V_{r−1} of
                the vocabulary. The numbers of rows may differ.
            group: the tensor-parallel processes; None: all of them.
            reduce_hidden_grad: whether the gradient of hidden is added up over the group (it has to
                be asked for on all of the processes then, or on none). False
                leaves each process its own part, for hidden states that were gathered by an
                operation whose backward adds them (Megatron-LM's sequence parallelism).

        Raises:
            ValueError: where `weight` is no matrix with rows, or torch.distributed has not been
                initialised.
        """
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] == 0:
            shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"weight should be of shape [V_r, D] with V_r > 0, got {shape}")
        group = known(group)
        own = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = tuple(int(size) for size in gathered(own, group))
        return cls.of(sizes, group, reduce_hidden_grad=reduce_hidden_grad)

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        group: dist.ProcessGroup | None = None,
        *,
        reduce_hidden_grad: bool = True,
    ) -> VocabParallel:
        """`over`, where each process's number of rows is known: nothing is communicated.

        Raises:
            ValueError: where `sizes` is not one positive number for each process of the group, or
                torch.distributed has not been initialised.
        """
        group, sizes = known(group), tuple(sizes)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
        if len(sizes) != dist.get_world_size(group) or not whole:
            count = dist.get_world_size(group)
            raise ValueError(f"sizes should be {count} positive numbers of rows, got {sizes}")
        return cls(sizes, dist.get_rank(group), group.group_name, reduce_hidden_grad)

    @property
    def start(self) -> int:
        """The vocabulary entry of this process's first row."""
        return sum(self.sizes[: self.rank])

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes)

    def local(self, labels: Tensor) -> Tensor:  # [N] -> [N], outside [0, V_r) for others' labels
        return labels - self.start

    def from_owner(self, values: Tensor, labels: Tensor) -> Tensor:  # [N], [N] local -> [N]
        """The value that the process found which holds the label."""
        inside = (labels >= 0) & (labels < self.sizes[self.rank])
        return self.total(torch.where(inside, values, 0.0))

    def total(self, values: Tensor) -> Tensor:
        """Σ over the processes, in their order."""
        return ordered_sum(values, GROUPS[self.group])

    def joined(self, sums: ExpSums) -> tuple[ExpSums, Tensor]:
        """The sums over the whole vocabulary, and w [N] of this process."""
        asked = {name: value for name, value in sums._asdict().items() if value is not None}
        parts = gathered(torch.stack(list(asked.values())), GROUPS[self.group])
        part = dict(zip(asked, torch.stack(parts, 1), strict=True))  # [P, N] each
        anchor = part["anchor"].amax(0)
        moved = torch.where(part["anchor"] == anchor, 0.0, part["anchor"] - anchor)
        w = torch.exp(moved)
        # Rows that are −∞ throughout have no share, and not 0 · ∞.
        share = torch.where(part["anchor"] == -torch.inf, 0.0, w * part["sum"])
        whole = {"anchor": anchor, "sum": in_order(share)}
        if "entropy" in part:
            terms = w * part["entropy"] + moved * share
            whole["entropy"] = in_order(torch.where(w == 0, 0.0, terms))
        if "collision" in part:
            whole["collision"] = in_order(torch.where(w == 0, 0.0, w * w * part["collision"]))
        if "logits" in part:
            whole["logits"] = in_order(part["logits"])
        for name in ("top", "own", "earlier"):
            if name in part:
                whole[name] = part[name].amax(0)
        return ExpSums(**whole), w[self.rank]

    def hidden_grad(self, part: Tensor) -> Tensor:  # [N, D], in the accumulate dtype
        """The sum over the processes, unless each is to have its own part."""
        if self.reduce_hidden_grad and part.numel():
            dist.all_reduce(part, group=GROUPS[self.group])
        return part


def vocabulary(name: str | None) -> VocabParallel | None:
    """By its name."""
    return None if name is None else _VOCABULARIES[name]
