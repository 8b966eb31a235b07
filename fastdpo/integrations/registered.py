"""Output heads of classes that fastdpo does not know by itself, described by those who do.

A head that is neither `torch.nn.Linear` nor PEFT's is refused: its forward may do anything.
`register_head` says what it does, as a function of its parameters,

    softcap(scale · (hidden · weightᵀ + bias))

and on the first call the description is compared with the model's own logits, as a family's entry
is (`fastdpo.integrations.probe`). Of Baichuan's NormHead, which comes with the model's own code and
is known by its name, the weight is normalised: weight_v = W_v / ‖W_v‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import HeadRule
from .unwrap import UnsupportedModel


@dataclass(frozen=True)
class HeadParts:
    """What a head of a registered class computes: softcap(scale · (hidden · weightᵀ + bias)).

    Attributes:
        weight: [V, D] in the dtype that the head multiplies in: a parameter, or a differentiable
            function of parameters.
        bias: [V], as weight, or None.
        scale: finite and not 0.
        softcap: positive, cap · tanh(· / cap), or None.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None


Describe = Callable[[Any], HeadParts]

_REGISTERED: dict[type[nn.Module] | str, Describe] = {}


def register_head(kind: type[nn.Module] | str, describe: Describe) -> None:
    """Teaches fastdpo a class of output heads.

        class CosineHead(nn.Module):
            def forward(self, hidden):
                return 20.0 * F.linear(hidden, F.normalize(self.weight))

        register_head(CosineHead, lambda head: HeadParts(F.normalize(head.weight), scale=20.0))

    A subclass that has its parent's forward is described like it; one with a forward of its own is
    not. What `describe` says is compared with the model's own logits on the first call with each
    model, in each of its modes.

    Args:
        kind: the class, or its name, for classes that come with a model's own code
            (trust_remote_code) and cannot be imported.
        describe: the head module to its `HeadParts`. It is called in each forward, inside the
            head's own call, when whatever shards its parameters has gathered them; the gradients of
            weight and bias flow through it. A weight [V, D] that it computes is memory of that
            size, as is its gradient where a parameter behind it is trained.

    Raises:
        ValueError: kind is no class of modules and no name, or has torch.nn.Linear's forward (which
            needs no description), or is registered already; describe cannot be called.
    """
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        if kind.forward is nn.Linear.forward:
            raise ValueError(
                f"kind should be a class with a forward of its own, got {kind.__name__}, which "
                "computes what torch.nn.Linear does and is read as it is"
            )
    elif not isinstance(kind, str) or not kind.isidentifier():
        raise ValueError(
            f"kind should be a class of torch.nn.Module or the name of one, got {kind!r}"
        )
    if not callable(describe):
        raise ValueError(
            "describe should be a function of the head module to HeadParts, got "
            f"{type(describe).__name__}"
        )
    if kind in _REGISTERED:
        name = kind if isinstance(kind, str) else kind.__name__
        raise ValueError(f"kind should be registered once, got {name}, which is already")
    _REGISTERED[kind] = describe


def description_of(module: nn.Module) -> Describe | None:
    """What was registered for the module's class, or for the one whose forward it has."""
    for cls in type(module).__mro__:
        found = _REGISTERED.get(cls) or _REGISTERED.get(cls.__name__)
        if found is not None or "forward" in vars(cls):
            return found
    return None


def described(module: nn.Module, describe: Describe) -> HeadParts:
    """
    Raises:
        UnsupportedModel: it is no description.
    """
    name = f"model: the description registered for its output head, a {type(module).__name__},"
    parts = describe(module)
    if not isinstance(parts, HeadParts):
        raise UnsupportedModel(f"{name} should be HeadParts, got {type(parts).__name__}")
    weight, bias = parts.weight, parts.bias
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise UnsupportedModel(f"{name} should have a weight [V, D], got {_what(weight)}")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        raise UnsupportedModel(
            f"{name} should have a bias of shape [{weight.shape[0]}], got {_what(bias)}"
        )
    if not _is_number(parts.scale) or parts.scale == 0:
        raise UnsupportedModel(f"{name} should have a scale that is not 0, got {parts.scale!r}")
    if parts.softcap is not None and not (_is_number(parts.softcap) and parts.softcap > 0):
        raise UnsupportedModel(f"{name} should have a positive softcap, got {parts.softcap!r}")
    return parts


def curve(parts: HeadParts, rule: HeadRule, name: str) -> tuple[float, float | None]:
    """The (scale, softcap) of a head's own curve inside its family's: with s the family's scale,

        s · cap · tanh(u / cap) = cap' · tanh(s · u / cap')        cap' = |s| · cap

    Raises:
        UnsupportedModel: both have a softcap, and one inside the other is none.
    """
    if parts.softcap is None:
        return rule.scale * parts.scale, rule.softcap
    if rule.softcap is not None:
        raise UnsupportedModel(
            f"model: its output head, a {name}, caps the logits, and so does its family's entry in "
            "fastdpo.integrations.families.FAMILIES: leave one of them out"
        )
    return rule.scale * parts.scale, abs(rule.scale) * parts.softcap


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _what(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"shape {list(value.shape)} in {value.dtype}"


def _norm_head(head: Any) -> HeadParts:
    # In eval mode its first call normalises the weight for good, and lowers the flag.
    normalized = not head.training and not getattr(head, "first_flag", True)
    return HeadParts(head.weight if normalized else torch.nn.functional.normalize(head.weight))


register_head("NormHead", _norm_head)
