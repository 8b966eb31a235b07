"""An lm_head that is called with something else than its product to compute.

Whatever shards parameters (FSDP2, FSDP1, ZeRO-3) gathers and casts them around the calls of
modules, and hangs the reduction of their gradients on what the calls return. So a loss that reads
the lm_head's weight has to run inside the lm_head's own call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .exact import Exact

_Result = TypeVar("_Result")

# By name, so that their packages are not imported. Each holds what it wraps as `module`.
_WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})


def call_head(lm_head: nn.Module, fn: Callable[..., _Result], *hidden: Tensor) -> _Result:
    """`fn(*hidden, weight, bias)`, computed inside a call of the lm_head.

        out = call_head(
            model.lm_head,
            lambda hidden, weight, bias: linear_dpo_loss(hidden, weight, labels, bias=bias, ...),
            hidden,
        )

    The module is called once, with `fn` in the place of its forward: FSDP2, FSDP1 and ZeRO-3 then
    gather its weight, cast it and the hidden states, and reduce its gradient, as for any other
    forward. Call it from the model's forward, or after it where the lm_head is gathered by its own
    call (a unit of its own, or one with the final norm), or stays gathered (the root unit, which
    fully_shard does not reshard after a forward by default).

    Args:
        lm_head: the module itself, in whatever it is wrapped (FSDP1, DistributedDataParallel,
            torch.compile). Of what its forward does `fn` gets the weight and the bias alone: a
            softcap or a scale is for `fn` to apply.
        fn: gets the hidden states, as the wrappers cast them, then the weight [V, D] and the bias
            [V] or None. Returns tensors (or None) in tuples, named tuples, lists or dicts.
        *hidden: [..., D] each: what wrappers cast and follow, so that a reference's hidden states
            for the same head belong here too. Labels need not.

    Returns:
        What `fn` returned, in the dtypes that it had: FSDP2's `output_dtype` does not round it, nor
        its gradient. Forward hooks on the lm_head are given its tensors, in a tuple; those of
        tensor parallelism (`torch.distributed.tensor`), which lay out logits, are left out.

    Raises:
        ValueError: naming the argument: a head that is no module, of PEFT or under activation
            checkpointing of its own; one whose weight is not whole inside its call, because another
            module's call gathers it; and where `fn` returns something else than tensors.
    """
    layer = _innermost(lm_head)
    if not callable(fn):
        _fail("fn", "a function of the hidden states, weight and bias", type(fn).__name__)
    for value in hidden:
        if not isinstance(value, Tensor):
            _fail("hidden", "tensors", type(value).__name__)

    def forward(*given: Tensor) -> _Result:
        _check_gathered(layer, given, len(hidden))
        return fn(*given, layer.weight, getattr(layer, "bias", None))

    return called(lm_head, forward, *hidden)


def called(module: nn.Module, forward: Callable[..., _Result], *inputs: Tensor) -> _Result:
    """`module(*inputs)`, with `forward` in the place of its forward, and no number rounded on its
    way out.
    """
    if torch.compiler.is_compiling():
        # Not a decorator: that would load the compiler with this module.
        return torch.compiler.disable(_called)(module, forward, *inputs)
    return _called(module, forward, *inputs)


def _called(module: nn.Module, forward: Callable[..., _Result], *inputs: Tensor) -> _Result:
    outer, inner = getattr(module, "_orig_mod", module), _innermost(module)
    pack = _Pack()

    def replaced(*given: Tensor) -> tuple[Tensor, ...]:
        return pack.depart(forward(*given))

    # A call of a compiled module would trace what takes its forward's place.
    attributes = {"forward": replaced, "_compiled_call_impl": None}
    with _attributes(inner, attributes), _without_layouts(inner):
        return pack.arrive(outer(*inputs))


class _Pack:
    """A result as the plain tuple of its tensors, which every wrapper looks through."""

    def __init__(self) -> None:
        self.result: Any = None
        self.exact: list[Exact | None] = []

    def depart(self, result: Any) -> tuple[Tensor, ...]:
        if self.exact:
            _fail("lm_head", "a module that calls its forward once", "a second call")
        self.result = result
        leaves = list(_leaves(result))
        self.exact = [Exact(t) if t.is_floating_point() else None for t in leaves]
        return tuple(
            t if e is None else e.depart(t) for t, e in zip(leaves, self.exact, strict=True)
        )

    def arrive(self, leaves: Any) -> Any:
        if not isinstance(leaves, (tuple, list)) or len(leaves) != len(self.exact):
            _fail("lm_head", "without hooks that replace what it returns", type(leaves).__name__)
        arrived = iter(
            [t if e is None else e.arrive(t) for t, e in zip(leaves, self.exact, strict=True)]
        )
        return _rebuilt(self.result, arrived)


def _leaves(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _leaves(value)
    elif isinstance(result, dict):
        for value in result.values():
            yield from _leaves(value)
    elif result is not None:
        should = "returning tensors, in tuples, lists or dicts"
        _fail("fn", should, type(result).__name__)


def _rebuilt(result: Any, leaves: Iterator[Tensor]) -> Any:
    if isinstance(result, Tensor):
        return next(leaves)
    if isinstance(result, dict):
        return {name: _rebuilt(value, leaves) for name, value in result.items()}
    if isinstance(result, (tuple, list)):
        values = [_rebuilt(value, leaves) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)
    return None


def _innermost(module: Any) -> Any:
    """Without what is wrapped around it.

    Raises:
        ValueError: what is left is no lm_head that can be called with another forward.
    """
    if not isinstance(module, nn.Module):
        _fail("lm_head", "a module", type(module).__name__)
    classes = {cls.__name__ for cls in type(module).__mro__}
    if classes & _WRAPPERS:
        return _innermost(module.module)
    if "_orig_mod" in module._modules:
        return _innermost(module._modules["_orig_mod"])
    if "CheckpointWrapper" in classes:
        should = "without activation checkpointing of its own, which would call its own forward"
        _fail("lm_head", should, type(module).__name__)
    if any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
        should = "a module that multiplies with its weight (for adapters: fastdpo.integrations.hf)"
        _fail("lm_head", should, type(module).__name__)
    return module


def _check_gathered(layer: Any, given: tuple[Tensor, ...], count: int) -> None:
    if len(given) != count:
        should = f"left {count} tensors by the hooks on lm_head: call it for one at a time"
        _fail("hidden", should, str(len(given)))
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        _fail("lm_head", "a module with a weight [V, D]", type(layer).__name__)
    ways = (
        "make it a unit of its own, or call this from the forward of the module that gathers it "
        "(fastdpo.parallel.ShardedHead leaves it sharded)"
    )
    if weight.dim() != 2 or weight.numel() == 0:
        should = f"gathered to a weight [V, D] by its own call: {ways}"
        _fail("lm_head", should, f"{list(weight.shape)}")
    if hasattr(weight, "device_mesh") and not any(hasattr(t, "device_mesh") for t in given):
        placed = f"a weight placed {getattr(weight, 'placements', None)}"
        _fail("lm_head", f"gathered by its own call: {ways}", placed)


@contextmanager
def _attributes(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Of the instance, where a module's call looks first."""
    own = vars(module)
    before = {name: own[name] for name in values if name in own}  # another patch's
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


@contextmanager
def _without_layouts(module: nn.Module) -> Iterator[None]:
    """Tensor parallelism's forward hooks know logits alone."""
    hooks = module._forward_hooks
    before = dict(hooks)
    for i, hook in before.items():
        hook = getattr(hook, "func", hook)
        if (getattr(hook, "__module__", None) or "").startswith("torch.distributed.tensor"):
            del hooks[i]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)


def _fail(argument: str, should: str, got: str) -> NoReturn:
    raise ValueError(f"{argument} should be {should}, got {got}")
