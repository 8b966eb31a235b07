"""The reference pass: no gradient and no dropout, and of a model that is its own reference another
adapter or none.

Everything that is changed for it is put back, module by module and parameter by parameter: PEFT's
`set_adapter` and the end of its `disable_adapter` set `requires_grad` as they think fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .adapters import is_of
from .quantized import rounds_hidden
from .registered import description_of
from .unwrap import causal_lm, is_prompted, peft_model

REF_ADAPTER = "ref"  # the name that TRL gives to the frozen copy of an adapter
BASE = "__base__"  # PEFT's name for no adapter at all

# How PEFT initialises what it takes out of the weight below.
_CHANGES_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq", "kasa")
# From one of its modules to what was there before.
_TO_BASE = ("base_model", "model", "base_layer", "original_module", "token_adapter")


@contextmanager
def as_reference(
    model: nn.Module,
    ref_model: nn.Module | None,
    ref_adapter: str | None,
    keys: Sequence[str],  # under which a batch could have had the reference
) -> Iterator[nn.Module]:
    """The model that is the reference, in the state in which it is.

    Raises:
        ValueError: there is none, or ref_adapter is not one that could be, or it is not what
            training started from, or would not stay so.
    """
    reference, trains = model if ref_model is None else ref_model, torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if ref_model is None:
            peft = peft_model(model)
            name = reference_adapter(peft, ref_adapter)
            if peft is None:
                raise ValueError(
                    "ref_model should be given: the model is no PEFT model whose adapter could be "
                    f"disabled, and the batch has no {' and '.join(keys)} (or pass "
                    "reference_free=True)"
                )
            if name is None:
                check_base(peft)
            if trains:
                check_frozen(peft)
            stack.enter_context(with_adapter(peft, name))
        stack.enter_context(without_dropout(reference))
        yield reference
        if ref_model is not None:
            _reshard(ref_model)


def check_another(model: nn.Module, ref_model: nn.Module) -> None:
    """PEFT puts most of its adapters into the model that it is given: what was the base is the
    policy from then on. But for prompts, which stay in the wrapper.

    Raises:
        ValueError: the policy would be compared with itself.
    """
    prompted = is_prompted(model) or is_prompted(ref_model)
    if causal_lm(model) is causal_lm(ref_model) and not prompted:
        raise ValueError(
            "ref_model should be another model than model, got the same one: all log-ratios are 0 "
            "(get_peft_model changes the model that it is given: leave ref_model out, and the "
            "reference is the model without its adapter)"
        )


def check_base(peft: Any) -> None:
    """
    Raises:
        ValueError: the model without its adapters is not what it was before it had them.
    """
    for name, config in peft.peft_config.items():
        how = str(getattr(config, "init_lora_weights", "")).lower()
        if getattr(config, "kasa_config", None) is not None:
            how = "kasa"
        if how.startswith(_CHANGES_BASE):
            raise ValueError(
                f"ref_model should be given: adapter {name!r} was initialised by {how!r}, which "
                "takes a part of the model's weights away, and the model without it is not the one "
                "that training starts from"
            )


def check_frozen(peft: Any) -> None:
    """
    Raises:
        ValueError: the reference would be trained too.
    """
    for path, parameter in peft.named_parameters():
        if parameter.requires_grad and _is_base(peft, path):
            raise ValueError(
                "ref_model should be given (or the batch's own reference) where more than adapters "
                f"is trained, got {path} with requires_grad=True: the reference would move with it"
            )


def _is_base(peft: Any, path: str) -> bool:
    """Does the model have this parameter without its adapters?"""
    module = peft
    for name in path.split("."):
        if is_of("peft", module) and name not in _TO_BASE:
            return False
        module = getattr(module, name)
    return True


def _reshard(model: nn.Module) -> None:
    """FSDP2 keeps what it has gathered of the root until a backward, which a reference never has:
    a head's memory, and more.
    """
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode. Not by `eval()`, which modules may override to do more.

    A registered head stays as it is (NormHead's eval mode writes over its weight), and so does
    bitsandbytes' Linear8bitLt (which on a CPU rounds its input in eval mode alone). Neither drops
    anything.
    """
    # But for those whose eval mode computes something else: policy and reference do the same.
    training = [m for m in model.modules() if m.training and not keeps_mode(m)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def keeps_mode(module: nn.Module) -> bool:
    return description_of(module) is not None or rounds_hidden(module)


def reference_adapter(peft: Any | None, ref_adapter: str | None) -> str | None:
    """The adapter of a PEFT model that is the reference; None for the model without adapters.

    Raises:
        ValueError: ref_adapter names none, or the trained one, or should have been given.
    """
    if ref_adapter is not None and not isinstance(ref_adapter, str):
        raise ValueError(
            f"ref_adapter should be the name of an adapter, got {type(ref_adapter).__name__}"
        )
    if peft is None:
        if ref_adapter is not None:
            raise ValueError(
                f"ref_adapter should be None for a model that is no PEFT model, got {ref_adapter!r}"
            )
        return None
    names, active = list(peft.peft_config), list(peft.active_adapters)
    if ref_adapter is None:
        idle = [name for name in names if name not in active]
        if not idle and REF_ADAPTER not in active:
            return None
        if REF_ADAPTER not in idle:
            raise ValueError(
                f"ref_adapter should be given for a model with the adapters {names}, of which "
                f"{active} active: the reference's name, or {BASE!r} for the model without "
                "adapters"
            )
        return REF_ADAPTER
    if ref_adapter == BASE and BASE not in names:
        return None
    if ref_adapter not in names:
        raise ValueError(
            f"ref_adapter should be one of {names}, or {BASE!r} for the model without adapters, "
            f"got {ref_adapter!r}"
        )
    if ref_adapter in active and _trained(peft, ref_adapter):
        raise ValueError(
            f"ref_adapter should be a frozen adapter, got {ref_adapter!r}, which is active and "
            "trained"
        )
    return ref_adapter


@contextmanager
def with_adapter(
    peft: Any,
    name: str | None,  # None: with none
) -> Iterator[None]:
    """The PEFT model with another adapter, or without, and afterwards as it was."""
    flags = [(p, p.requires_grad) for p in peft.parameters()]
    try:
        with peft.disable_adapter() if name is None else _active(peft, name):
            yield
    finally:
        for parameter, requires_grad in flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextmanager
def _active(peft: Any, name: str) -> Iterator[None]:
    if any(getattr(module, "merged", False) is True for module in peft.modules()):
        raise ValueError(
            "model should have its adapters unmerged where ref_adapter is the reference "
            "(unmerge_adapter)"
        )
    # What set_adapter sets, in PeftModel, in its tuner and in the layers. It has no inverse: layers
    # may have several active adapters, and each its own.
    state = [
        (module, attribute, vars(module)[attribute])
        for module in peft.modules()
        for attribute in ("active_adapter", "_active_adapter")
        if attribute in vars(module)
    ]
    try:
        peft.set_adapter(name)
        yield
    finally:
        for module, attribute, value in state:
            setattr(module, attribute, value)


def _trained(peft: Any, name: str) -> bool:
    return any(
        parameter.requires_grad and name in path.split(".")
        for path, parameter in peft.named_parameters()
    )
