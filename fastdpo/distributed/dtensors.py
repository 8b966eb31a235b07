"""Hidden states and heads that are DTensors: computed on each process's own part, as a vocabulary
that the processes share where the head is sharded by rows.

    hidden        weight, bias      computed as
    Replicate     Shard(0)          `VocabParallel` over the mesh
    Replicate     Replicate         the same on every process
    plain         DTensor           refused: under fully_shard hidden states are each process's own,
                                    under tensor parallelism the same on all of them

Everything on one mesh of one dimension. Results are DTensors where hidden is: Replicate, as the
loss is that PyTorch's own `loss_parallel` returns.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from .vocabulary import VocabParallel

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

AMBIGUOUS = (
    "whole where hidden states are plain: under fully_shard they are each process's own, under "
    "tensor parallelism the same on all. Call the loss inside of fastdpo.parallel.call_head, which "
    "gathers the weight (fully_shard); or give weight.full_tensor(grad_placements=[Partial('avg')])"
    " (fully_shard), sharded_head=ShardedHead.of(weight) (fully_shard, the weight is never whole), "
    "or weight.to_local() with vocab_parallel=VocabParallel.of(...), or hidden as a DTensor "
    "(tensor parallelism)"
)


def is_dtensor(value: Any) -> bool:
    # By what it has: to import its class takes a while, and compiled code follows this too.
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def any_dtensor(values: Iterable[Any]) -> bool:
    return any(is_dtensor(value) for value in values)


def takes_dtensors(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """For a function of hidden, weight, bias, ref_* and vocab_parallel, by these names."""
    signature = inspect.signature(function)

    def on_local(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Result:
        bound = signature.bind(*args, **kwargs)
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            given.update(value if rest else {name: value})
        stays: Any = given.get("sharded_head")
        if hasattr(stays, "local"):
            heads = ("weight", "bias", "ref_weight", "ref_bias")
            given.update({n: stays.local(n, given[n]) for n in heads if n in given})
        if stays is not None:
            for name, value in given.items():
                if is_dtensor(value):
                    _fail(
                        name, "a plain tensor, this process's own, with sharded_head", "a DTensor"
                    )
            return function(**given)  # type: ignore[call-arg]
        if given.get("vocab_parallel") is not None:
            _fail("vocab_parallel", "None for DTensors, which say it themselves", "one")
        local = Local.of(given, (Names(), Names("ref_hidden", "ref_weight", "ref_bias")))
        found = function(**{**local.tensors, "vocab_parallel": local.vocab_parallel})  # type: ignore[call-arg]
        return local.placed(found)

    @functools.wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        stays_sharded = kwargs.get("sharded_head") is not None
        if not (stays_sharded or any_dtensor(args) or any_dtensor(kwargs.values())):
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():  # a break of the graph
            return torch.compiler.disable(on_local)(args, kwargs)
        return on_local(args, kwargs)

    return wrapped


@dataclass(frozen=True)
class Names:
    """Of the arguments that are a head and what it multiplies."""

    hidden: str = "hidden"
    weight: str = "weight"
    bias: str = "bias"


@dataclass(frozen=True)
class Local:
    """A call's arguments without DTensors, and how to make DTensors of its results."""

    tensors: Mapping[str, Any]
    mesh: Any
    vocab_parallel: VocabParallel | None

    @classmethod
    def of(cls, given: Mapping[str, Any], heads: tuple[Names, ...]) -> Local:
        """
        Raises:
            ValueError: placements of which the result is not known.
        """
        for names in heads:
            _check_alike(given, names)
        placed = {name: value for name, value in given.items() if is_dtensor(value)}
        first = next(iter(placed))
        mesh = placed[first].device_mesh
        sharded = None
        for name, value in placed.items():
            if value.device_mesh.ndim != 1:
                should = "a DTensor on a mesh of one dimension, that of tensor parallelism"
                _fail(name, should, f"{value.device_mesh}")
            if value.device_mesh != mesh:
                _fail(name, f"on the mesh of {first}, {mesh}", f"{value.device_mesh}")
            (placement,) = value.placements
            if any(name in (names.weight, names.bias) for names in heads):
                _check_head(name, placement)
                kind = "sharded" if placement.is_shard() else "replicated"
                sharded = (name, kind) if sharded is None else sharded
                if kind != sharded[1]:
                    _fail(name, f"{sharded[1]}, as {sharded[0]} is", f"{placement}")
            elif not placement.is_replicate():
                should = "placed Replicate() (redistribute it)"
                _fail(name, should, f"{placement}")
        spread = None
        if sharded is not None and sharded[1] == "sharded":
            weight = next(n.weight for n in heads if n.weight in placed)
            spread = spread_over(mesh, placed[weight], weight)
        tensors = {n: v.to_local() if n in placed else v for n, v in given.items()}
        return cls(tensors, mesh, spread)

    def placed(self, result: Any) -> Any:
        """Tensors, alone or in tuples, as DTensors."""
        from torch.distributed.tensor import DTensor, Replicate

        if isinstance(result, Tensor):
            return DTensor.from_local(result, self.mesh, [Replicate()], run_check=False)
        if isinstance(result, tuple):
            values = [self.placed(value) for value in result]
            return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
        return result


def spread_over(
    mesh: Any,
    weight: Any,  # [V, D] a DTensor, Shard(0) over the last dimension of its mesh
    name: str = "weight",
    dim: int = 0,
) -> VocabParallel:
    """The rows that `distribute_tensor` gives to each process.

    Raises:
        ValueError: a process has none, or others.
    """
    vocab, size = weight.shape[0], mesh.size(dim)
    share = -(-vocab // size)
    sizes = [max(0, min(share, vocab - start)) for start in range(0, share * size, share)]
    rows, own = weight.to_local().shape[0], sizes[mesh.get_local_rank(dim)]
    if min(sizes) == 0 or rows != own:
        should = f"sharded so that each of {size} processes has rows, as distribute_tensor does it"
        _fail(name, should, f"{vocab} rows, {rows} of them here")
    return VocabParallel.of(sizes, mesh.get_group(dim))


def _check_alike(given: Mapping[str, Any], names: Names) -> None:
    hidden, weight, bias = (given.get(n) for n in (names.hidden, names.weight, names.bias))
    if hidden is None:
        return
    if is_dtensor(weight) and not is_dtensor(hidden):
        placed = f"a DTensor placed {weight.placements}"  # type: ignore[union-attr]
        _fail(names.weight, AMBIGUOUS, placed)
    if is_dtensor(hidden) and weight is not None and not is_dtensor(weight):
        should = f"a DTensor on {names.hidden}'s mesh (or {names.hidden} a plain tensor)"
        _fail(names.weight, should, "a plain tensor")
    if bias is not None and is_dtensor(bias) != is_dtensor(weight):
        _fail(names.bias, f"placed as {names.weight} is", "one DTensor of the two")


def _check_head(name: str, placement: Any) -> None:
    if not (placement.is_shard(0) or placement.is_replicate()):
        should = "placed Shard(0), by rows of the vocabulary, or Replicate()"
        _fail(name, should, f"{placement}")


def _fail(argument: str, should: str, got: str) -> NoReturn:
    raise ValueError(f"{argument} should be {should}, got {got}")
