"""What processes exchange, and in which order it is added up.

Numbers per row are gathered and added in the processes' order, so that every process computes the
same bits, whatever the network does; the gradient of hidden is an all-reduce in the accumulate
dtype. Follows Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al., arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# By name, for the operators that torch.compile sees: they take no objects.
GROUPS: dict[str, dist.ProcessGroup] = {}


def known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group should be of a torch.distributed that has been initialised")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group should be a ProcessGroup of this process, got {group!r}")
    GROUPS[group.group_name] = group
    return group


def gathered(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every process's, in their order."""
    if values.numel() == 0:
        return [values] * dist.get_world_size(group)
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return parts


def gathered_rows(values: Tensor, group: dist.ProcessGroup) -> Tensor:  # [N, ...] -> [P·N, ...]
    """Every process's, as many from each, in their order."""
    whole = values.new_empty(dist.get_world_size(group) * values.shape[0], *values.shape[1:])
    # By its name since PyTorch 2.13, which warns of the one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, values.contiguous(), group=group)
    return whole


def scattered_sum(values: Tensor, group: dist.ProcessGroup) -> Tensor:  # [P·N, ...] -> [N, ...]
    """Σ over the processes, of each process's share of the rows."""
    own = values.new_empty(values.shape[0] // dist.get_world_size(group), *values.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, values.contiguous(), group=group)
    return own


def ordered_sum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    return in_order(gathered(values, group))


def in_order(parts: Sequence[Tensor] | Tensor) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
