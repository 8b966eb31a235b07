"""Reads an output head: its weight, its bias, and the adapters that PEFT has put on it.

LoRA on the head, z = h · Wᵀ + s · drop(h) · Aᵀ · Bᵀ, is a head of a few more columns:

    z = [h, p] · [W, B]ᵀ        p = s · drop(h) · Aᵀ        ∂loss/∂B = Eᵀ · diag(−gain g r) · p

which keeps the adapter's own precision (W + s · B · A in 16 bits would round it away) and its
dropout. The columns stay apart (`Head.extra`), so that W is not copied and, frozen, has no gradient
computed: that of B is a product r columns wide (equation (8) of `fastdpo.core.linear`). With the
adapter disabled the columns are zero but stay, so that a reference and a policy that are equal are
equal to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.contract import Head
from ..distributed.vocabulary import VocabParallel
from .families import HeadRule, head_rule
from .quantized import check_readable, dequantized
from .tensor_parallel import is_fully_sharded, local_rows, spread_of
from .unwrap import UnsupportedModel, bare, causal_lm, output_head


@dataclass(frozen=True)
class HeadReader:
    """What can be known of a head before it is called. Its parameters are read while it is, when
    whatever shards them has gathered them.
    """

    lm: nn.Module  # unwrapped
    layers: tuple[Any, ...]  # the head and what it wraps, down to the layer that multiplies
    rule: HeadRule
    adapters: tuple[Adapter, ...]  # LoRA on the head
    disabled: bool  # the adapters, not the head

    @classmethod
    def of(cls, lm: Any) -> HeadReader:
        """
        Raises:
            UnsupportedModel: the head's arithmetic is not known, or it is quantized in a way that
                cannot be read.
        """
        layers = tuple(_layers(output_head(lm)))
        module = layers[-1]
        disabled = _is_lora(module) and bool(module.disable_adapters)
        reader = cls(lm, layers, head_rule(lm), tuple(_adapters(module)), disabled)
        weight = getattr(reader.base, "weight", None)  # FSDP1 may have taken it away
        if weight is not None:
            check_readable(local_rows(weight))
        return reader

    @property
    def base(self) -> Any:
        """The linear layer."""
        module = self.layers[-1]
        return module.base_layer if _is_lora(module) else module

    @property
    def vocab_size(self) -> int:
        """Of the whole vocabulary, also where nobody has all of its rows."""
        base = self.base
        weight = getattr(base, "weight", None)
        gone = weight is None or weight.dim() != 2 or weight.numel() == 0
        size = base.out_features if gone else weight.shape[0]  # type: ignore[union-attr]
        return size if self.rule.vocab_size is None else min(size, self.rule.vocab_size)

    def vocab_parallel(self) -> VocabParallel | None:
        """How tensor parallelism spreads the head; None where it does not.

        Raises:
            UnsupportedModel: it is sharded in another way, or changed by what needs all of it.
        """
        spread = spread_of(self.lm, self.base.weight)
        if spread is not None and (self.adapters or self.rule.vocab_size is not None):
            what = "LoRA on the head" if self.adapters else "a padded vocabulary that is cut off"
            raise UnsupportedModel(f"model: {what} is not supported under tensor parallelism")
        return spread

    def read(self) -> Head:
        """The head without its adapters, and before its padding is cut off."""
        base = self.base
        spread_of(self.lm, base.weight)  # refuses what is sharded in another way
        weight = dequantized(local_rows(base.weight))
        _check_weight(weight)
        return Head(weight, local_rows(base.bias), scale=self.rule.scale, softcap=self.rule.softcap)

    def cut(self, head: Head) -> Head:
        size = self.rule.vocab_size
        return head if size is None else head.columns(0, min(size, head.vocab_size))

    def bind(
        self,
        hidden: Tensor,  # [..., D]
        *,
        with_dropout: bool = True,
    ) -> tuple[Tensor, Head]:  # [..., D + r]
        """The head together with the hidden states that it multiplies.

        Without autocast they come in the weight's dtype: a layer inside an adapter may have a hook
        that casts its input, and could not be multiplied otherwise.
        """
        head = self.read()
        # Models split over several devices keep the head on the last one.
        hidden = hidden.to(head.weight.device)
        autocast = torch.is_autocast_enabled(hidden.device.type)
        dtype = hidden.dtype if autocast else head.weight.dtype
        hiddens, extras, bias = [hidden.to(dtype)], [], head.bias
        for a in self.adapters:
            if self.disabled:
                hiddens.append(hiddens[0].new_zeros(*hidden.shape[:-1], a.lora_a.weight.shape[0]))
                extras.append(head.weight.new_zeros(a.lora_b.weight.shape))
                continue
            taken = hidden.to(a.lora_a.weight.dtype)
            projected = a.lora_a(a.dropout(taken) if with_dropout else taken) * a.scaling
            hiddens.append(projected.to(dtype))  # [..., r]
            extras.append(a.lora_b.weight.to(head.weight.dtype))
            bias = _plus_bias(bias, a)
        if not extras:
            return hiddens[0], self.cut(head)
        extra = extras[0] if len(extras) == 1 else torch.cat(extras, -1)
        head = dataclasses.replace(head, extra=extra, bias=bias)
        return torch.cat(hiddens, -1), self.cut(head)


class Adapter(NamedTuple):
    lora_a: nn.Linear
    lora_b: nn.Linear
    scaling: float
    dropout: nn.Module


def read_head(model: nn.Module) -> Head:
    """The head of a Hugging Face causal language model, as `fastdpo.loss` takes it.

    It maps the input of the model's lm_head to the model's own logits. For almost every family that
    input is the backbone's last hidden state; see `hidden_scale` for the one that scales it on the
    way. LoRA adapters on the head are added to its weight (`HeadReader.bind` keeps them apart). Of
    a head under tensor parallelism these are this process's rows (`vocab_parallel`).

    Args:
        model: a causal language model of transformers, bare or inside its wrappers (PEFT,
            DistributedDataParallel, torch.compile).

    Raises:
        UnsupportedModel: the head is sharded, quantized, offloaded, or a module whose arithmetic is
            not known.
    """
    reader = HeadReader.of(causal_lm(model))
    _refuse_gathered(reader)
    head = reader.read()
    for adapter in () if reader.disabled else reader.adapters:
        delta = torch.mm(adapter.lora_b.weight, adapter.lora_a.weight) * adapter.scaling  # [V, D]
        head = dataclasses.replace(
            head,
            weight=head.weight + delta.to(head.weight.dtype),
            bias=_plus_bias(head.bias, adapter),
        )
    return reader.cut(head)


def vocab_parallel(model: nn.Module) -> VocabParallel | None:
    """How transformers' tensor parallelism spreads the head over processes, as `fastdpo.loss` takes
    it; None where it does not.

    Raises:
        UnsupportedModel: the head is sharded in another way, or changed by what needs all of it.
    """
    reader = HeadReader.of(causal_lm(model))
    _refuse_gathered(reader)
    return reader.vocab_parallel()


def hidden_scale(model: nn.Module) -> float:
    """What the last hidden state is multiplied by before the head: 1, but for MiniCPM3."""
    return head_rule(causal_lm(model)).hidden_scale


def _refuse_gathered(reader: HeadReader) -> None:
    """Parameters that only a forward gathers."""
    weight = getattr(reader.base, "weight", None)
    sharded = hasattr(weight, "device_mesh") and is_fully_sharded(reader.lm, *reader.layers)
    if weight is None or weight.numel() == 0 or sharded:
        kind = "gone" if weight is None else f"a {type(weight).__name__} {tuple(weight.shape)}"
        raise UnsupportedModel(
            f"model: the lm_head's weight is sharded ({kind}: FSDP, ZeRO-3) and is gathered only "
            "while the head is called: use dpo_loss or sequence_logps, or "
            "fastdpo.distributed.call_head"
        )


def _layers(module: Any) -> Iterator[Any]:
    """The head, what it wraps, and so on, down to the plain linear layer or PEFT's LoRA on one."""
    yield module
    if (inner := bare(module)) is not module:
        yield from _layers(inner)
    elif _is_linear(module) or (_is_lora(module) and _is_linear(module.base_layer)):
        return
    elif _is_of("peft", module):
        yield from _layers(_active(module))
    else:
        _refuse_bitsandbytes(module)
        # An own forward cannot be trusted to be linear, not even after a successful probe: what an
        # adapter does may still be zero.
        raise UnsupportedModel(
            f"model: its output head is a {type(module).__name__}, whose arithmetic fastdpo does "
            "not know (expected torch.nn.Linear, or PEFT's LoRA or modules_to_save around one)"
        )


def _active(module: Any) -> nn.Module:
    """What PEFT's modules_to_save calls."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if module.disable_adapters or not module.active_adapters:
            return module.original_module
        return module.modules_to_save[module.active_adapters[0]]
    _refuse_bitsandbytes(getattr(module, "base_layer", module))
    raise UnsupportedModel(
        f"model: its output head is wrapped in PEFT's {type(module).__name__}; on the head fastdpo "
        "knows LoRA and modules_to_save"
    )


def _refuse_bitsandbytes(module: nn.Module) -> None:
    if _is_of("bitsandbytes", module):
        raise UnsupportedModel(
            "model: its output head is quantized by bitsandbytes (a "
            f"{type(module).__name__}), which fastdpo does not read: keep the head unquantized, "
            'with llm_int8_skip_modules=["lm_head"] in the BitsAndBytesConfig'
        )


def _adapters(module: Any) -> Iterator[Adapter]:
    """Of every active LoRA adapter on the head, disabled or not."""
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
        yield Adapter(
            module.lora_A[name],
            module.lora_B[name],
            module.scaling[name],
            module.lora_dropout[name],
        )


def _plus_bias(
    bias: Tensor | None,  # [V]
    adapter: Adapter,
) -> Tensor | None:  # [V]
    if adapter.lora_b.bias is None:
        return bias
    extra = adapter.lora_b.bias * adapter.scaling
    return extra if bias is None else bias + extra.to(bias.dtype)


def _is_linear(module: Any) -> bool:
    return type(module).forward is nn.Linear.forward  # parametrized ones included


def _is_lora(module: nn.Module) -> bool:
    if not _is_of("peft", module):
        return False
    from peft.tuners.lora.layer import Linear as LoraLinear

    return isinstance(module, LoraLinear)


def _is_of(package: str, module: nn.Module) -> bool:
    # fully_shard puts a class of its own before the module's.
    return any(cls.__module__.startswith(f"{package}.") for cls in type(module).__mro__)


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise UnsupportedModel(
            f"model: the lm_head's weight has shape {tuple(weight.shape)} instead of [V, D]: "
            "it is sharded (FSDP, ZeRO-3) and has to be gathered first"
        )
    if weight.is_meta:
        raise UnsupportedModel("model: the lm_head's weight is offloaded (on the meta device)")
