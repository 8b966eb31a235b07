"""What a probe's verdict is about: everything that a model's forward may look at before it returns
its logits, other than the numbers in the hidden states and in the head.

Two calls with equal subjects do the same to their logits, so the second needs no probe: training
and evaluation that take turns are probed once each. An optimizer's in-place update of the head
changes no subject, another parameter in its place does.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdRef

from .families import HeadRule
from .unwrap import wrappers

Subject = tuple[Any, ...]  # hashable, and keeps no module and no tensor alive


def subject_of(
    model: nn.Module,  # as the caller passed it
    head: nn.Module,
    rule: HeadRule,
    device_type: str,
    model_kwargs: Mapping[str, Any],
    inside: bool,  # whether the language model's earlier forward is called in place of the model
) -> Subject:
    chain = wrappers(model)
    lm: Any = chain[-1]
    holders = _holders(lm, head)
    beside = [child for holder in holders for child in holder.children() if child is not head]
    autocast = torch.is_autocast_enabled(device_type)
    return (
        rule,
        inside,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(device_type) if autocast else None,
        getattr(lm, "dtype", None),
        tuple(sorted((name, _option(value)) for name, value in model_kwargs.items())),
        tuple(_scalars(config, (bool, int, float, str)) for config in _configs(lm)),
        tuple(_behaviour(module) for module in (*chain, *holders, *beside, *head.modules())),
        # A head's own flags as well, by which it may choose what it multiplies.
        tuple(_scalars(m, (bool, float, str)) for m in (*holders, *head.modules())),
        tuple(_tensors(holder) for holder in holders),
        tuple(_adapters(module) for module in head.modules()),
        tuple((WeakIdRef(p), p.dtype, p.device) for p in head.parameters()),
    )


def _holders(lm: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules that the head's logits pass on their way out: the language model and what lies
    between it and the head."""
    for name, module in lm.named_modules():
        if module is head:
            parts = name.split(".")[:-1]
            return [lm.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    return [lm]


def _configs(lm: Any) -> Iterator[Any]:
    yield lm.config
    text = getattr(lm.config, "get_text_config", None)
    if text is not None:
        yield text()


def _behaviour(module: nn.Module) -> tuple[Any, ...]:
    """Its mode, and what has been put around its forward or in its place."""
    return (
        _reference(type(module)),
        module.training,
        _reference(type(module).forward),
        _reference(vars(module).get("forward")),
        tuple(module._forward_pre_hooks),  # the handles' numbers, which are never used again
        tuple(module._forward_hooks),
    )


def _reference(value: Any) -> Any:
    """Equal for one and the same object and for nothing else, also when that is gone."""
    if isinstance(value, types.MethodType):  # made anew whenever it is looked up
        value = value.__func__
    try:
        return None if value is None else weakref.ref(value)
    except TypeError:
        return id(value)


def _scalars(holder: Any, kinds: tuple[type, ...]) -> tuple[tuple[str, Any], ...]:
    """No counters: of a module, integers are left out by the caller."""
    return tuple((name, value) for name, value in vars(holder).items() if type(value) in kinds)


def _tensors(holder: nn.Module) -> tuple[Any, ...]:
    """A holder's own parameters and buffers (a trained scale of the logits) by their contents, for
    which their versions stand. Not FSDP1's, which are all of the model's in one."""
    named = (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False))
    own = (tensor for name, tensor in named if name != "_flat_param")
    return tuple((WeakIdRef(t), None if t.is_inference() else t._version) for t in own)


def _option(value: Any) -> str:
    """Integers and tensors change with every batch (lengths, positions); what they are does not."""
    switch = value is None or isinstance(value, (bool, float, str))
    return repr(value) if switch else type(value).__name__


def _adapters(module: Any) -> tuple[Any, ...]:
    """PEFT's state of a layer; empty for a layer of another kind."""
    if not hasattr(module, "disable_adapters") or not hasattr(module, "active_adapters"):
        return ()
    merged = getattr(module, "merged_adapters", ())
    return tuple(module.active_adapters), bool(module.disable_adapters), tuple(merged)
