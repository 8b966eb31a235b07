"""Reads an output head: its weight, its bias, and the adapters that PEFT has put on it.

LoRA on the head, z = h · Wᵀ + s · drop(h) · Aᵀ · Bᵀ, is a head of a few more columns:

    z = [h, s · drop(h) · Aᵀ] · [W, B]ᵀ

which keeps the adapter's own precision (W + s · B · A in 16 bits would round it away) and its
dropout. Its price is a copy of the weight, and a gradient of its size. With the adapter disabled
the columns are zero but stay, so that a reference and a policy that are equal are equal to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.contract import Head
from ..distributed.vocabulary import VocabParallel
from .families import head_rule
from .quantized import check_readable, dequantized
from .tensor_parallel import local_rows, spread_of
from .unwrap import UnsupportedModel, causal_lm, output_head, uncompiled


def read_head(model: nn.Module) -> Head:
    """The head of a Hugging Face causal language model, as `fastdpo.loss` takes it.

    It maps the input of the model's lm_head to the model's own logits. For almost every family that
    input is the backbone's last hidden state; see `hidden_scale` for the one that scales it on the
    way. LoRA adapters on the head are added to its weight (`bind_head` keeps them apart). Of a
    head under tensor parallelism these are this process's rows (`vocab_parallel`).

    Args:
        model: a causal language model of transformers, bare or inside DistributedDataParallel,
            torch.compile or PEFT.

    Raises:
        UnsupportedModel: the head is sharded, quantized, offloaded, or a module whose arithmetic is
            not known.
    """
    lm = causal_lm(model)
    module = _resolve(output_head(lm))
    head = _described(lm, module)
    adapters = [] if _is_lora(module) and module.disable_adapters else _adapters(module)
    for lora_a, lora_b, scaling, _ in adapters:
        delta = torch.mm(lora_b.weight, lora_a.weight) * scaling  # [V, D]
        head = dataclasses.replace(
            head,
            weight=head.weight + delta.to(head.weight.dtype),
            bias=_plus_bias(head.bias, lora_b, scaling),
        )
    return _cut(lm, head)


def bind_head(
    lm: nn.Module,
    hidden: Tensor,  # [..., D]
    *,
    with_dropout: bool = True,
    autocast: bool = False,
) -> tuple[Tensor, Head]:  # [..., D + r]
    """The head of an unwrapped model together with the hidden states that it multiplies.

    Without autocast they come in the weight's dtype: a layer inside an adapter may have a hook that
    casts its input, and could not be multiplied otherwise.
    """
    module = _resolve(output_head(lm))
    head = _described(lm, module)
    # Models split over several devices keep the head on the last one.
    hidden = hidden.to(head.weight.device)
    dtype = hidden.dtype if autocast else head.weight.dtype
    hiddens, weights, bias = [hidden.to(dtype)], [head.weight], head.bias
    disabled = _is_lora(module) and module.disable_adapters
    for lora_a, lora_b, scaling, dropout in _adapters(module):
        if disabled:
            hiddens.append(hiddens[0].new_zeros(*hidden.shape[:-1], lora_a.weight.shape[0]))
            weights.append(head.weight.new_zeros(lora_b.weight.shape))
            continue
        taken = hidden.to(lora_a.weight.dtype)
        projected = lora_a(dropout(taken) if with_dropout else taken) * scaling  # [..., r]
        hiddens.append(projected.to(dtype))
        weights.append(lora_b.weight.to(head.weight.dtype))
        bias = _plus_bias(bias, lora_b, scaling)
    if len(weights) == 1:
        return hiddens[0], _cut(lm, head)
    head = dataclasses.replace(head, weight=torch.cat(weights, -1), bias=bias)
    return torch.cat(hiddens, -1), _cut(lm, head)


def multiplier(head: nn.Module) -> nn.Module:
    """The module inside `head` whose forward gets the hidden states and returns logits, after every
    wrapper around it.

    Raises:
        UnsupportedModel: its arithmetic is not known.
    """
    module = _resolve(head)
    check_readable(local_rows(_base(module).weight))
    return module


def vocab_parallel(model: nn.Module) -> VocabParallel | None:
    """How transformers' tensor parallelism spreads the head over processes, as `fastdpo.loss` takes
    it; None where it does not.

    Raises:
        UnsupportedModel: the head is sharded in another way, or changed by what needs all of it.
    """
    lm = causal_lm(model)
    module = _resolve(output_head(lm))
    spread = spread_of(lm, _base(module).weight)
    if spread is not None and (_is_lora(module) or head_rule(lm).vocab_size is not None):
        what = "LoRA on the head" if _is_lora(module) else "a padded vocabulary that is cut off"
        raise UnsupportedModel(f"model: {what} is not supported under tensor parallelism")
    return spread


def hidden_scale(model: nn.Module) -> float:
    """What the last hidden state is multiplied by before the head: 1, but for MiniCPM3."""
    return head_rule(causal_lm(model)).hidden_scale


def _described(lm: nn.Module, module: Any) -> Head:
    base = _base(module)
    spread_of(lm, base.weight)  # refuses what is sharded in another way
    check_readable(local_rows(base.weight))
    weight = dequantized(local_rows(base.weight))
    _check_weight(weight)
    rule = head_rule(lm)
    return Head(weight, local_rows(base.bias), scale=rule.scale, softcap=rule.softcap)


def _base(module: Any) -> Any:
    return module.base_layer if _is_lora(module) else module


def _cut(lm: nn.Module, head: Head) -> Head:
    size = head_rule(lm).vocab_size
    return head if size is None else head.columns(0, min(size, head.vocab_size))


def _resolve(module: nn.Module) -> Any:
    """The plain linear layer, or PEFT's LoRA around one, that `module` is or stands for."""
    module = uncompiled(module)
    if _is_linear(module):
        return module
    if type(module).__module__.startswith("peft."):
        return _resolve_peft(module)
    _refuse_bitsandbytes(module)
    # An own forward cannot be trusted to be linear, not even after a successful probe: what an
    # adapter does may still be zero.
    raise UnsupportedModel(
        f"model: its output head is a {type(module).__name__}, whose arithmetic fastdpo does not "
        "know (expected torch.nn.Linear, or PEFT's LoRA or modules_to_save around one)"
    )


def _resolve_peft(module: Any) -> Any:
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if module.disable_adapters or not module.active_adapters:
            return _resolve(module.original_module)
        return _resolve(module.modules_to_save[module.active_adapters[0]])
    if _is_lora(module) and _is_linear(module.base_layer):
        return module
    _refuse_bitsandbytes(getattr(module, "base_layer", module))
    raise UnsupportedModel(
        f"model: its output head is wrapped in PEFT's {type(module).__name__}; on the head fastdpo "
        "knows LoRA and modules_to_save"
    )


def _refuse_bitsandbytes(module: nn.Module) -> None:
    if any(cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__):
        raise UnsupportedModel(
            "model: its output head is quantized by bitsandbytes (a "
            f"{type(module).__name__}), which fastdpo does not read: keep the head unquantized, "
            'with llm_int8_skip_modules=["lm_head"] in the BitsAndBytesConfig'
        )


def _adapters(module: Any) -> Iterator[tuple[nn.Linear, nn.Linear, float, nn.Module]]:
    """A, B, scaling and dropout of every active LoRA adapter on the head, disabled or not."""
    if not _is_lora(module) or module.merged:
        return
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            raise UnsupportedModel(
                f"model: adapter {name!r} puts a LoRA variant on the output head; plain LoRA is "
                "supported there"
            )
        yield (
            module.lora_A[name],
            module.lora_B[name],
            module.scaling[name],
            module.lora_dropout[name],
        )


def _plus_bias(
    bias: Tensor | None,  # [V]
    lora_b: nn.Linear,
    scaling: float,
) -> Tensor | None:  # [V]
    if lora_b.bias is None:
        return bias
    extra = lora_b.bias * scaling
    return extra if bias is None else bias + extra.to(bias.dtype)


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward  # parametrized ones included


def _is_lora(module: nn.Module) -> bool:
    if not type(module).__module__.startswith("peft."):
        return False
    from peft.tuners.lora.layer import Linear as LoraLinear

    return isinstance(module, LoraLinear)


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise UnsupportedModel(
            f"model: the lm_head's weight has shape {tuple(weight.shape)} instead of [V, D]: "
            "it is sharded (FSDP, ZeRO-3) and has to be gathered first"
        )
    if weight.is_meta:
        raise UnsupportedModel("model: the lm_head's weight is offloaded (on the meta device)")
