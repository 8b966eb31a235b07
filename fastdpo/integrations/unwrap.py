"""From the model that a trainer holds to the causal language model inside, and to its output head.

Wrappers (DistributedDataParallel, torch.compile, PEFT) are taken off only to read the head. The forward goes
through the object that the caller passed, so that every wrapper's hooks run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastdpo.head import Head
from fastdpo.integrations.families import HeadRule, head_rule


class UnsupportedModel(ValueError):
    """The model's head cannot be described exactly, so nothing is computed; the message says why."""


def causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face causal language model inside its wrappers."""
    while True:
        inner = _inner(model)
        if inner is model:
            break
        model = inner
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise UnsupportedModel(
            f"model: expected a Hugging Face causal language model, got {type(model).__name__}"
        )
    return model


def peft_model(model: nn.Module) -> Any | None:
    """The PEFT model among the wrappers, or None where there is none."""
    while True:
        if _is_peft(model):
            return model
        inner = _inner(model)
        if inner is model:
            return None
        model = inner


def _is_peft(model: nn.Module) -> bool:
    # By its methods rather than its class: importing peft takes seconds that others should not pay.
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def _inner(model: nn.Module) -> nn.Module:
    if hasattr(model, "_orig_mod"):  # torch.compile
        return model._orig_mod
    if isinstance(model, DistributedDataParallel):
        return model.module
    if _is_peft(model):
        return model.get_base_model()
    return model


def output_head(lm: nn.Module) -> nn.Module:
    """The module that maps hidden states to the vocabulary."""
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UnsupportedModel(f"model: {type(lm).__name__} has no single output head to read")
    return head


def read_head(model: nn.Module) -> Head:
    """The head of a Hugging Face causal language model, as `fastdpo.loss` takes it.

    It maps the input of the model's lm_head to the model's own logits. For almost every family that input is the
    backbone's last hidden state; see `hidden_scale` for the one that scales it on the way.

    Args:
        model: a causal language model of transformers, bare or inside DistributedDataParallel, torch.compile or PEFT.

    Raises:
        UnsupportedModel: the head is sharded, quantized, offloaded, or a module whose arithmetic is not known.
    """
    lm = causal_lm(model)
    weight, bias = _weight_and_bias(output_head(lm))
    _check_weight(weight)
    rule = head_rule(lm)
    head = Head(weight, bias, scale=rule.scale, softcap=rule.softcap)
    return head if rule.vocab_size is None else head.columns(0, rule.vocab_size)


def hidden_scale(model: nn.Module) -> float:
    """What the model multiplies its backbone's last hidden state by before the head (1.0 but for MiniCPM3)."""
    rule: HeadRule = head_rule(causal_lm(model))
    return rule.hidden_scale


def _check_weight(weight: Tensor) -> None:
    if isinstance(weight, DTensor):
        raise UnsupportedModel(
            "model: the lm_head's weight is a DTensor (fully_shard or tensor parallelism): unshard it, "
            "or pass hidden states and the full weight to fastdpo.loss"
        )
    if weight.ndim != 2 or weight.numel() == 0:
        raise UnsupportedModel(
            f"model: the lm_head's weight has shape {tuple(weight.shape)} instead of [V, D]: it is sharded "
            "(FSDP, ZeRO-3) and has to be gathered first"
        )
    if weight.is_meta:
        raise UnsupportedModel("model: the lm_head's weight is offloaded (on the meta device)")
    if not weight.is_floating_point():
        raise UnsupportedModel(
            f"model: the lm_head's weight is quantized ({weight.dtype}); keep the head unquantized"
        )


def _weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """weight [V, D] and bias [V] of a head that is, or wraps, a plain linear layer."""
    if hasattr(head, "_orig_mod"):
        head = head._orig_mod
    if type(head).forward is nn.Linear.forward:  # nn.Linear, and subclasses that only add parametrizations
        return head.weight, head.bias
    if type(head).__module__.startswith("peft."):
        return _peft_weight_and_bias(head)
    # An own forward cannot be trusted to be linear, not even after one successful probe: adapters start at zero.
    raise UnsupportedModel(
        f"model: its output head is a {type(head).__name__}, whose arithmetic fastdpo does not know "
        "(expected torch.nn.Linear, or PEFT's LoRA or modules_to_save around one)"
    )


def _peft_weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        if head.disable_adapters or not head.active_adapters:
            return _weight_and_bias(head.original_module)
        return _weight_and_bias(head.modules_to_save[head.active_adapters[0]])
    if isinstance(head, LoraLinear):
        return _lora_weight_and_bias(head)
    raise UnsupportedModel(
        f"model: its output head is wrapped in PEFT's {type(head).__name__}; on the head fastdpo knows LoRA and "
        "modules_to_save"
    )


def _lora_weight_and_bias(head: Any) -> tuple[Tensor, Tensor | None]:
    """W + Σ scaling · B A over the active adapters: differentiable, one copy of [V, D] a step."""
    weight, bias = _weight_and_bias(head.base_layer)
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant:
            raise UnsupportedModel(
                f"model: adapter {name!r} puts a LoRA variant on the output head; plain LoRA is supported there"
            )
        dropout = head.lora_dropout[name]
        if head.training and getattr(dropout, "p", 0.0) > 0.0:
            raise UnsupportedModel(
                f"model: adapter {name!r} puts LoRA with dropout {dropout.p} on the output head: set lora_dropout to 0, "
                "or leave the head out of target_modules"
            )
        lora_b, scaling = head.lora_B[name], head.scaling[name]
        delta = torch.mm(lora_b.weight, head.lora_A[name].weight).mul(scaling)  # [V, D]
        weight = weight + delta.to(weight.dtype)
        if lora_b.bias is not None:
            extra = (lora_b.bias * scaling).to(weight.dtype)
            bias = extra if bias is None else bias + extra
    return weight, bias
