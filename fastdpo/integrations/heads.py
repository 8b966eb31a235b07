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
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..backends.contract import Head
from ..distributed.vocabulary import VocabParallel
from .adapters import Adapter, active, adapters_of, is_lora, is_of, trains_rows, with_trained_rows
from .families import HeadRule, head_rule
from .quantized import (
    check_layer,
    check_readable,
    dequantized,
    dequantized_layer,
    layer_weight,
    of_bitsandbytes,
    rounds_hidden,
)
from .registered import Describe, curve, described, description_of
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
    rows: Any | None = None  # PEFT's layer with rows of the weight that are trained
    describe: Describe | None = None  # of a registered class

    @classmethod
    def of(cls, lm: Any) -> HeadReader:
        """
        Raises:
            UnsupportedModel: the head's arithmetic is not known, or it is quantized in a way that
                cannot be read.
        """
        layers = tuple(_layers(output_head(lm)))
        module = layers[-1]
        disabled = is_lora(module) and bool(module.disable_adapters)
        inner = list(_inner_layers(module))
        rows = next((layer for layer in inner if trains_rows(layer)), None)
        describe = description_of(inner[-1])
        adapters = tuple(adapters_of(module))
        reader = cls(lm, layers, head_rule(lm), adapters, disabled, rows, describe)
        reader._check_adapters()
        if of_bitsandbytes(reader.base) is not None:
            check_layer(reader.base)
            return reader
        weight = getattr(reader.base, "weight", None)  # FSDP1 may have taken it away
        if weight is not None and describe is None:
            check_readable(local_rows(weight))
        return reader

    def _check_adapters(self) -> None:
        read_as_it_is = self.describe is None and of_bitsandbytes(self.base) is None
        if self.rows is not None and not read_as_it_is:
            raise UnsupportedModel(
                "model: its output head has trainable_token_indices on a "
                f"{type(self.base).__name__}; they are supported on a torch.nn.Linear alone"
            )
        if not any(a.magnitude is not None for a in self.adapters):
            return
        unsupported = {
            "trainable_token_indices": self.rows is not None,
            f"a registered {type(self.base).__name__}": self.describe is not None,
            # PEFT 0.21 takes the layer's state apart in its forward, on a CPU beyond repair.
            "bitsandbytes' Linear8bitLt": rounds_hidden(self.base),
        }
        for what, is_so in unsupported.items():
            if is_so:
                raise UnsupportedModel(
                    f"model: its output head has a DoRA adapter on {what}; DoRA is supported on a "
                    "torch.nn.Linear or on bitsandbytes' Linear4bit, by itself"
                )

    @property
    def base(self) -> Any:
        """The layer inside the adapters."""
        return list(_inner_layers(self.layers[-1]))[-1]

    @property
    def vocab_size(self) -> int:
        """Of the whole vocabulary, also where nobody has all of its rows. Of a registered head this
        is a guess until it is called.
        """
        base = self.base
        weight = getattr(base, "weight", None)
        gone = weight is None or weight.dim() != 2 or weight.numel() == 0
        if gone or of_bitsandbytes(base) is not None:
            named = getattr(base, "out_features", None)
            lm: Any = self.lm
            size = lm.config.get_text_config().vocab_size if named is None else named
        else:
            size = weight.shape[0]  # type: ignore[union-attr]
        return size if self.rule.vocab_size is None else min(size, self.rule.vocab_size)

    @property
    def chooses_dtype(self) -> bool:
        """Is the dtype of the product the layer's, whatever autocast says?"""
        return of_bitsandbytes(self.base) is not None

    def vocab_parallel(self) -> VocabParallel | None:
        """How tensor parallelism spreads the head; None where it does not.

        Raises:
            UnsupportedModel: it is sharded in another way, or changed by what needs all of it.
        """
        if self.describe is not None:
            for parameter in self.base.parameters():
                if spread_of(self.lm, parameter) is not None:
                    name = type(self.base).__name__
                    raise UnsupportedModel(
                        f"model: its output head, a registered {name}, is not supported under "
                        "tensor parallelism"
                    )
            return None
        spread = spread_of(self.lm, self.base.weight)
        changed = {
            "LoRA on the head": bool(self.adapters),
            "trainable_token_indices": self.rows is not None,
            "a padded vocabulary that is cut off": self.rule.vocab_size is not None,
        }
        what = next((name for name, is_so in changed.items() if is_so), None)
        if spread is not None and what is not None:
            raise UnsupportedModel(f"model: {what} is not supported under tensor parallelism")
        return spread

    def read(self) -> Head:
        """The head without LoRA, and before its padding is cut off."""
        base, rule = self.base, self.rule
        if self.describe is not None:
            parts = described(base, self.describe)
            name = type(base).__name__
            if self.adapters and (parts.scale != 1.0 or parts.softcap is not None):
                raise UnsupportedModel(
                    f"model: LoRA on its output head, a registered {name} with a scale or a "
                    "softcap, is added behind them; fastdpo does not know how"
                )
            scale, softcap = curve(parts, rule, name)
            return Head(parts.weight, parts.bias, scale=scale, softcap=softcap)
        if of_bitsandbytes(base) is not None:
            return self._with_bias_of(base, layer_weight(base))
        spread_of(self.lm, base.weight)  # refuses what is sharded in another way
        weight, bias = dequantized(local_rows(base.weight)), local_rows(base.bias)
        if self.rows is not None:
            weight, bias = with_trained_rows(self.rows, weight, bias)
        _check_weight(weight)
        return Head(weight, bias, scale=rule.scale, softcap=rule.softcap)

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
        multiplied, head = self._multiplied(hidden)
        hidden = hidden.to(multiplied.device)
        hiddens, extras = [multiplied], []
        for adapter in self.adapters:
            if self.disabled:
                rank = adapter.lora_a.weight.shape[0]
                hiddens.append(multiplied.new_zeros(*multiplied.shape[:-1], rank))
                extras.append(head.weight.new_zeros(adapter.lora_b.weight.shape))
                continue
            added, columns, head = adapter.columns(hidden, head, with_dropout)
            hiddens.extend(part.to(multiplied.dtype) for part in added)
            extras.extend(part.to(head.weight.dtype) for part in columns)
        if not extras:
            return multiplied, self.cut(head)
        extra = extras[0] if len(extras) == 1 else torch.cat(extras, -1)
        return torch.cat(hiddens, -1), self.cut(dataclasses.replace(head, extra=extra))

    def _multiplied(self, hidden: Tensor) -> tuple[Tensor, Head]:  # [..., D]
        """What the layer inside the adapters multiplies."""
        base = self.base
        if of_bitsandbytes(base) is not None:
            multiplied, weight = dequantized_layer(base, hidden.to(base.weight.device))
            return multiplied, self._with_bias_of(base, weight)
        head = self.read()
        # Models split over several devices keep the head on the last one.
        hidden = hidden.to(head.weight.device)
        autocast = torch.is_autocast_enabled(hidden.device.type)
        return hidden if autocast else hidden.to(head.weight.dtype), head

    def _with_bias_of(self, base: Any, weight: Tensor) -> Head:
        bias = None if base.bias is None else base.bias.to(weight.dtype)
        return Head(weight, bias, scale=self.rule.scale, softcap=self.rule.softcap)


def read_head(model: nn.Module) -> Head:
    """The head of a Hugging Face causal language model, as `fastdpo.loss` takes it.

    It maps the input of the model's lm_head to the model's own logits. For almost every family that
    input is the backbone's last hidden state; see `hidden_scale` for the one that scales it on the
    way. LoRA adapters on the head are added to its weight (`HeadReader.bind` keeps them apart). Of
    a head under tensor parallelism these are this process's rows (`vocab_parallel`).

    Nothing is run, so that nothing is compared with the model's logits, as the first call of
    `dpo_loss` or `sequence_logps` is: what a forward does to its logits beside what its class and
    configuration say is not seen.

    Args:
        model: a causal language model of transformers, bare or inside its wrappers (PEFT,
            DistributedDataParallel, torch.compile).

    Raises:
        UnsupportedModel: the head is sharded, quantized, offloaded, or a module whose arithmetic is
            not known.
    """
    reader = HeadReader.of(causal_lm(model))
    _refuse_gathered(reader)
    if rounds_hidden(reader.base):
        raise UnsupportedModel(
            "model: its output head is bitsandbytes' Linear8bitLt, which rounds its hidden states: "
            "no weight says what it computes. Use dpo_loss or sequence_logps, which round them too"
        )
    head = reader.read()
    for adapter in () if reader.disabled else reader.adapters:
        weight = head.weight
        delta = torch.mm(adapter.lora_b.weight, adapter.lora_a.weight) * adapter.scaling  # [V, D]
        merged = weight + delta.to(weight.dtype)
        if adapter.magnitude is not None:
            merged = (adapter.row_scale(weight).unsqueeze(1) * merged).to(weight.dtype)
        head = dataclasses.replace(head, weight=merged, bias=adapter.bias_of(head))
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
    base = reader.base
    tensors = [getattr(base, "weight", None)] if reader.describe is None else base.parameters()
    for weight in tensors:
        sharded = hasattr(weight, "device_mesh") and is_fully_sharded(reader.lm, *reader.layers)
        if weight is not None and weight.numel() and not sharded:
            continue
        kind = "gone" if weight is None else f"a {type(weight).__name__} {tuple(weight.shape)}"
        raise UnsupportedModel(
            f"model: the lm_head's weight is sharded ({kind}: FSDP, ZeRO-3) and is gathered only "
            "while the head is called: use dpo_loss or sequence_logps, or "
            "fastdpo.parallel.call_head"
        )


def _layers(module: Any) -> Iterator[Any]:
    """The head, what it wraps, and so on, down to the layer whose forward multiplies: the innermost
    one, or PEFT's around it.
    """
    yield module
    if (inner := bare(module)) is not module:
        yield from _layers(inner)
    elif is_lora(module) or trains_rows(module):
        list(_inner_layers(module))  # known, or refused
    elif is_of("peft", module):
        if (wrapped := active(module)) is None:
            raise UnsupportedModel(
                f"model: its output head is wrapped in PEFT's {type(module).__name__}; on the head "
                "fastdpo knows LoRA, DoRA, trainable_token_indices and modules_to_save"
            )
        yield from _layers(wrapped)
    elif not _multiplies(module):
        _refuse(module)


def _inner_layers(module: Any) -> Iterator[Any]:
    """A layer of `_layers`' last kind, and what it wraps down to what multiplies."""
    yield module
    if is_lora(module) or trains_rows(module):
        yield from _inner_layers(module.base_layer)
    elif is_of("peft", module) and trains_rows(wrapped := active(module)):
        yield from _inner_layers(wrapped)
    elif not _multiplies(module):
        _refuse(module)


def _multiplies(module: Any) -> bool:
    known = of_bitsandbytes(module) is not None or description_of(module) is not None
    return known or _is_linear(module)


def _refuse(module: Any) -> NoReturn:
    # An own forward cannot be trusted to be linear, not even after a successful probe: what an
    # adapter does may still be zero.
    name = type(module).__name__
    raise UnsupportedModel(
        f"model: its output head is a {name}, whose arithmetic fastdpo does not know (expected "
        "torch.nn.Linear, bitsandbytes' Linear4bit or Linear8bitLt, or PEFT's LoRA, DoRA, "
        "trainable_token_indices or modules_to_save around one); describe it with "
        f"fastdpo.integrations.hf.register_head({name}, ...)"
    )


def _is_linear(module: Any) -> bool:
    return type(module).forward is nn.Linear.forward  # parametrized ones included


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise UnsupportedModel(
            f"model: the lm_head's weight has shape {tuple(weight.shape)} instead of [V, D]: "
            "it is sharded (FSDP, ZeRO-3) and has to be gathered first"
        )
    if weight.is_meta:
        raise UnsupportedModel("model: the lm_head's weight is offloaded (on the meta device)")
