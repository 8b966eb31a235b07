"""Several processes that share a vocabulary or a sequence: what they tell each other.

**A vocabulary.** Under tensor parallelism each process holds V_r consecutive rows of the lm_head.
The primitives do not notice: a label outside [0, V_r) lies in another tile of the vocabulary, here
in another process. With α the largest of the anchors α_r that the processes used, and S_r and T_r
their sums of e and of e · (z − α_r),

    a = Σ_r a_r (0 but where the label is)      S = Σ_r w_r S_r       w_r = exp(α_r − α)
    T = Σ_r w_r (T_r + (α_r − α) S_r)           E_r := w_r E_r

hold for the whole vocabulary: a few numbers per row are exchanged, never logits, and equations (1)
to (6) of `fastdpo.core.linear` go on as they are. The gradient of the weight stays where its rows
are; that of hidden is a sum over the processes.

**A sequence.** Under sequence (or context) parallelism each process holds some tokens of every
sequence: the sequences' log-probabilities and lengths are sums over the processes.

Numbers per row are gathered and added in the processes' order, so that every process computes the
same bits, whatever the network does; the gradient of hidden is an all-reduce in the accumulate
dtype. Follows Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al., arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.backends.contract import ExpSums
from fastdpo.names import NAMESPACE, ops

# By name, for the operators that torch.compile sees: they take no objects.
_GROUPS: dict[str, dist.ProcessGroup] = {}
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
        if self.group not in _GROUPS:
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
        group = _known(group)
        own = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = tuple(int(size) for size in _gathered(own, group))
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
        group, sizes = _known(group), tuple(sizes)
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
        return _ordered_sum(values, _GROUPS[self.group])

    def joined(self, sums: ExpSums) -> tuple[ExpSums, Tensor]:
        """The sums over the whole vocabulary, and w [N] of this process."""
        asked = {name: value for name, value in sums._asdict().items() if value is not None}
        gathered = _gathered(torch.stack(list(asked.values())), _GROUPS[self.group])
        part = dict(zip(asked, torch.stack(gathered, 1), strict=True))  # [P, N] each
        anchor = part["anchor"].amax(0)
        moved = torch.where(part["anchor"] == anchor, 0.0, part["anchor"] - anchor)
        w = torch.exp(moved)
        # Rows that are −∞ throughout have no share, and not 0 · ∞.
        share = torch.where(part["anchor"] == -torch.inf, 0.0, w * part["sum"])
        whole = {"anchor": anchor, "sum": _in_order(share)}
        if "entropy" in part:
            terms = w * part["entropy"] + moved * share
            whole["entropy"] = _in_order(torch.where(w == 0, 0.0, terms))
        if "collision" in part:
            whole["collision"] = _in_order(torch.where(w == 0, 0.0, w * w * part["collision"]))
        if "logits" in part:
            whole["logits"] = _in_order(part["logits"])
        if "top" in part:
            whole["top"] = part["top"].amax(0)
        return ExpSums(**whole), w[self.rank]

    def hidden_grad(self, part: Tensor) -> Tensor:  # [N, D], in the accumulate dtype
        """The sum over the processes, unless each is to have its own part."""
        if self.reduce_hidden_grad and part.numel():
            dist.all_reduce(part, group=_GROUPS[self.group])
        return part


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
        return cls(_known(group).group_name)

    def total(self, values: Tensor) -> Tensor:
        """Σ over the processes, in their order; its gradient is each process's own."""
        return ops.total(values, self.group)


def vocabulary(name: str | None) -> VocabParallel | None:
    """By its name."""
    return None if name is None else _VOCABULARIES[name]


@torch.library.custom_op(f"{NAMESPACE}::total", mutates_args=())
def _total(values: Tensor, group: str) -> Tensor:
    return _ordered_sum(values, _GROUPS[group])


@_total.register_fake
def _(values: Tensor, group: str) -> Tensor:
    return torch.empty_like(values)


# Every process computes the same loss from the total, so its own part's gradient is the total's.
torch.library.register_autograd(f"{NAMESPACE}::total", lambda ctx, grad: (grad, None))


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group should be of a torch.distributed that has been initialised")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group should be a ProcessGroup of this process, got {group!r}")
    _GROUPS[group.group_name] = group
    return group


def _gathered(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every process's, in their order."""
    if values.numel() == 0:
        return [values] * dist.get_world_size(group)
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return parts


def _ordered_sum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _in_order(_gathered(values, group))


def _in_order(parts: Sequence[Tensor] | Tensor) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
