"""From the model that a trainer holds to the causal language model inside, and to its output head.

Wrappers (DistributedDataParallel, FSDP, DeepSpeed, torch.compile, PEFT) are taken off only to find
the head. The forward goes through the object that the caller passed, so that every wrapper's hooks
run.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# By name: their packages take seconds to import, or are not there. Each holds what it wraps as
# `module`, and lends it its attributes, so that it looks like a language model itself.
_WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})
# What a language model inside them cannot be called without: they gather its parameters.
_SHARDING = frozenset({"FullyShardedDataParallel", "DeepSpeedEngine", "FSDPModule"})


class UnsupportedModel(ValueError):
    """The model's log-probabilities cannot be computed exactly; the message says why."""


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face causal language model inside its wrappers.

    Raises:
        UnsupportedModel: it is none, by its class or its configuration. (What only its forward
            shows, `fastdpo.integrations.forward.examine` finds.)
    """
    lm: Any = wrappers(model)[-1]
    if not callable(getattr(lm, "get_output_embeddings", None)) or not hasattr(lm, "config"):
        raise UnsupportedModel(
            f"model: expected a Hugging Face causal language model, got {type(lm).__name__}"
        )
    kind = _not_decoder_only(lm)
    if kind is not None:
        raise UnsupportedModel(
            f"model: expected a decoder-only causal language model, got {type(lm).__name__}, {kind}"
        )
    return lm


def _not_decoder_only(lm: Any) -> str | None:
    configs = (lm.config, lm.config.get_text_config())
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        return "an encoder and a decoder: the encoder would see the answers"
    if any(cls.__name__.endswith("ForMaskedLM") for cls in type(lm).__mro__):
        return "a masked language model: every token would see the answers"
    return None


def output_head(lm: Any) -> nn.Module:
    """The module that maps hidden states to the vocabulary."""
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UnsupportedModel(f"model: {type(lm).__name__} has no single output head to read")
    return head


def peft_model(model: nn.Module) -> Any | None:
    """The PEFT model among the wrappers, or None where there is none."""
    while not _is_peft(model):
        inner = _inner(model)
        if inner is model:
            return None
        model = inner
    return model


def is_prompted(model: nn.Module) -> bool:
    """Has it an adapter that puts virtual tokens before the sequence, and is not disabled?"""
    peft = peft_model(model)
    return _learns_prompts(peft) and not _is_disabled(peft)


def disabled_prompt(model: nn.Module) -> Any | None:
    """The PEFT model whose virtual tokens are left out (`disable_adapter`); None where none is."""
    peft = peft_model(model)
    return peft if _learns_prompts(peft) and _is_disabled(peft) else None


def _learns_prompts(peft: Any) -> bool:
    return bool(getattr(getattr(peft, "active_peft_config", None), "is_prompt_learning", False))


def _is_disabled(peft: Any) -> bool:
    return bool(getattr(peft, "_adapters_disabled", False))


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The model, what it wraps, and so on, down to the causal language model."""
    found = [model]
    while (inner := _inner(found[-1])) is not found[-1]:
        found.append(inner)
    return found


def sharding(model: nn.Module) -> nn.Module | None:
    """The outermost wrapper without which a forward finds parameters that are not gathered; None
    where there is none.
    """
    return next((m for m in wrappers(model) if _class_names(m) & _SHARDING), None)


def bare(module: Any) -> nn.Module:
    """A head, say, without torch.compile and FSDP1 around it."""
    while (inner := _unwrapped(module)) is not module:
        module = inner
    return module


def _unwrapped(module: Any) -> nn.Module:
    return module.module if _class_names(module) & _WRAPPERS else uncompiled(module)


def uncompiled(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _inner(model: Any) -> nn.Module:
    return model.get_base_model() if _is_peft(model) else _unwrapped(model)


def _is_peft(model: nn.Module) -> bool:
    # By its methods rather than its class: importing peft takes seconds that others should not pay.
    if _class_names(model) & _WRAPPERS:
        return False
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
