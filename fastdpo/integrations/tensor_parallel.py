"""A head that tensor parallelism has spread over processes (`from_pretrained(tp_plan="auto")`).

Its weight is then a DTensor, sharded by rows over the tensor-parallel mesh, and its input is the
same on every process: what `fastdpo.parallel.VocabParallel` describes. While the head is called
nothing else makes a DTensor of its weight: fully_shard has gathered its own by then.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..distributed.vocabulary import VocabParallel
from .unwrap import UnsupportedModel


def local_rows(parameter: Any) -> Any:  # [V, ...] -> [V_r, ...], differentiable
    """This process's rows; the parameter itself where it is not spread."""
    return parameter.to_local() if hasattr(parameter, "device_mesh") else parameter


def spread_of(
    lm: nn.Module,  # a model of transformers
    weight: Tensor,  # [V, D]
) -> VocabParallel | None:
    """How the head is spread; None where it is not.

    Raises:
        UnsupportedModel: it is spread in another way.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return None
    placements = tuple(weight.placements)  # type: ignore[attr-defined]
    by_rows = len(placements) == 1 and placements[0].is_shard(0)
    names = mesh.mesh_dim_names in (None, ("tp",))
    if not (by_rows and names and getattr(lm, "tp_size", None) == mesh.size()):
        raise UnsupportedModel(
            f"model: the lm_head's weight is a DTensor, placed {placements} on {mesh}, and not by "
            "transformers' tensor parallelism: pass hidden states and the weight to fastdpo.loss"
        )
    vocab, share = weight.shape[0], -(-weight.shape[0] // mesh.size())
    sizes = [min(share, vocab - start) for start in range(0, vocab, share)]  # as DTensor does
    if len(sizes) < mesh.size():
        raise UnsupportedModel(
            f"model: its {vocab} vocabulary entries leave some of {mesh.size()} "
            "tensor-parallel processes without any"
        )
    return VocabParallel.of(sizes, mesh.get_group())


def spread_by_hooks(
    lm: nn.Module,  # a model of transformers
    layer: nn.Module,  # its head
) -> bool:
    """Whether the head's input is spread by hooks on it (transformers before 5.24), and not by the
    forward that it was given.
    """
    spread = hasattr(getattr(layer, "weight", None), "device_mesh")
    return spread and (getattr(lm, "tp_size", None) or 1) > 1 and "forward" not in vars(layer)


def is_fully_sharded(*modules: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in modules)
