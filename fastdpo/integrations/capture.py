"""Runs a model up to its lm_head and no further: what the head would have multiplied.

For the duration of one forward the head is tapped (`fastdpo.integrations.tap`): its input is kept,
and it multiplies zero rows of it. Everything before the head (and around it: wrappers, hooks, a
scaling of the hidden states, BERT's transform) runs as the model wrote it, and the logits it
returns are [.., 0, V].
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from ..backends.contract import Head
from ..distributed.vocabulary import VocabParallel
from . import probe
from .batches import IGNORE_INDEX
from .families import head_rule
from .heads import bind_head, vocab_parallel
from .order import UNKNOWN, Order, order_of
from .positions import placed
from .subject import Subject, subject_of
from .tap import HeadTap, Tapped
from .unwrap import (
    UnsupportedModel,
    causal_lm,
    output_head,
    peft_model,
)


class Captured(NamedTuple):
    """What one forward left behind."""

    hidden: Tensor  # [S, T, D] the lm_head's input
    head: Head
    autocast_dtype: torch.dtype | None  # the autocast that was in force at the head, None for none
    aux_loss: Tensor | None  # [] the balancing loss of a mixture of experts, if asked for
    vocab_parallel: VocabParallel | None  # where head is this process's rows

    @property
    def vocab_size(self) -> int:
        spread = self.vocab_parallel
        return self.head.vocab_size if spread is None else spread.vocab_size


class _Prepared(NamedTuple):
    """What is known before a forward."""

    lm: Any
    head: nn.Module
    spread: VocabParallel | None
    subject: Subject
    probing: bool
    model_kwargs: dict[str, Any]


# Where torch.compile compiles a forward that calls this one, it goes on at the model's own forward.
@torch.compiler.disable(recursive=False)
def capture(
    model: nn.Module,
    input_ids: Tensor,  # [S, T]
    attention_mask: Tensor | None = None,  # [S, T]
    *,
    forward: Callable[..., Any] | None = None,
    **model_kwargs: Any,
) -> Captured:
    """One forward of `model`, without its logits.

    `forward` is what to call in place of the model: the forward that the model had, where the
    caller has replaced it and is inside that replacement. Calling the model there would enter
    its wrappers a second time, accelerate's autocast among them, which does not survive that.

    Raises:
        ValueError: the model cannot be right about the padding, or is given a second sequence.
        UnsupportedModel: the head cannot be described, or is not what the description says; or the
            model is not causal.
    """
    prepared = _prepared(model, input_ids, attention_mask, forward, model_kwargs)
    lm, head, spread, _, probing, model_kwargs = prepared
    call = functools.partial(forward or model, input_ids=input_ids, **model_kwargs)
    with Tapped(lm, head, probing, spread) as tap:
        outputs = _eagerly(call) if probing else call()
    return _captured(prepared, tap, outputs, model, input_ids)


@torch.compiler.disable
def _prepared(
    model: nn.Module,
    input_ids: Tensor,  # [S, T]
    attention_mask: Tensor | None,  # [S, T]
    forward: Callable[..., Any] | None,
    model_kwargs: dict[str, Any],
) -> _Prepared:
    lm = causal_lm(model)
    head, spread = output_head(lm), vocab_parallel(lm)
    order = examine(model, input_ids.device, forward=forward, **model_kwargs)
    if attention_mask is not None and order is not None:
        place = placed(
            order,
            type(lm).__name__,
            attention_mask,
            model_kwargs.get("position_ids"),
            _is_prompted(model),
        )
        if place is not None:
            model_kwargs["position_ids"] = place
    if attention_mask is not None:
        model_kwargs["attention_mask"] = attention_mask
    model_kwargs = {**_no_cache(lm), **model_kwargs}
    device_type, inside = input_ids.device.type, forward is not None
    subject = subject_of(model, head, head_rule(lm), device_type, model_kwargs, inside)
    probing = input_ids.numel() > 0 and not probe.is_verified(head, subject)
    return _Prepared(lm, head, spread, subject, probing, model_kwargs)


@torch.compiler.disable
def _eagerly(call: Callable[[], Any]) -> Any:
    """A probe's forward happens once: torch.compile would compile it for that once, and count it
    among the variants of a model that it is willing to compile."""
    with torch.compiler.set_stance("force_eager"):
        return call()


@torch.compiler.disable
def _captured(
    prepared: _Prepared, tap: HeadTap, outputs: Any, model: nn.Module, input_ids: Tensor
) -> Captured:
    """What the forward that gave `outputs` left behind, verified where it probed."""
    lm, head_module, spread, subject, *_ = prepared
    hidden, autocast = _captured_hidden(tap, model, lm, input_ids), tap.autocast_dtype
    if tap.rows is not None:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        if spread is not None:  # every process has all logits, and answers for its own
            logits = logits[..., spread.start :][..., : spread.sizes[spread.rank]]
        probe.verify(head_module, lm, tap.rows, logits, subject, autocast)
    hidden, head = bind_head(lm, hidden, autocast=autocast is not None)
    return Captured(hidden, head, autocast, getattr(outputs, "aux_loss", None), spread)


@torch.compiler.disable
def examine(
    model: nn.Module,
    device: torch.device | None = None,
    *,
    labels: Tensor | None = None,  # [S, T]
    forward: Callable[..., Any] | None = None,
    **model_kwargs: Any,
) -> Order | None:
    """What the model does with the order of its tokens; None where that cannot be asked (no data,
    or while compiling). The answer is found once per model, by two or three tiny forwards.

    Raises:
        ValueError: model_kwargs has a second sequence, an encoder's or a decoder's; or tokens with
            a label are of a type that the tokens before them see.
        UnsupportedModel: the model is no decoder-only causal language model.
    """
    lm = causal_lm(model)
    for name in model_kwargs:
        if name.startswith("decoder_") or name == "encoder_outputs":
            raise ValueError(
                f"{name} should not be given: a decoder-only model reads its labels from input_ids"
            )
    some = next(lm.parameters())
    device = some.device if device is None else device
    if torch.compiler.is_compiling() or device.type == "meta" or detect_fake_mode(some) is not None:
        return None
    head, spread = output_head(lm), vocab_parallel(lm)

    def ask(typed: bool) -> Order:
        def run(ids: Tensor, mask: Tensor, position_ids: Tensor | None) -> Tensor | None:
            given = _no_cache(lm)
            if position_ids is not None:
                given["position_ids"] = position_ids
            if typed:
                given["token_type_ids"] = torch.ones_like(ids)
            with Tapped(lm, head, False, spread) as tap:
                (forward or lm)(input_ids=ids, attention_mask=mask, **given)
            hidden = tap.hidden
            whole = tap.calls == 1 and hidden is not None and hidden.shape[:-1] == ids.shape
            return hidden if whole else None

        takes_positions = "position_ids" in _parameters(lm)
        return order_of(lm, run, takes_positions=takes_positions, typed=typed, device=device)

    order = ask(typed=False)
    types = model_kwargs.get("token_type_ids")
    if not order.causal and types is not None:  # a prefix is seen from everywhere, and the rest not
        by_types = ask(typed=True)
        if by_types is not UNKNOWN:
            order = by_types
        if order.causal and labels is not None:
            _refuse_seen_labels(types, labels)
    if not order.causal:
        hint = " with token_type_ids of 1" if types is not None else ""
        raise UnsupportedModel(
            f"model: {type(lm).__name__} is not causal{hint}: a token changes the hidden states "
            "before it (an encoder, a masked language model, BERT without is_decoder=True, or a "
            "prefix without token_type_ids?)"
        )
    return order


def _refuse_seen_labels(
    types: Tensor,  # [S, T]
    labels: Tensor,  # [S, T]
) -> None:
    seen = ((types == 0) & (labels != IGNORE_INDEX).to(types.device)).any()
    message = (
        "token_type_ids should be 1 where a token has a label: the model sees those of 0 from "
        "everywhere"
    )
    if types.device.type != "cpu":
        torch._assert_async(~seen, message)
    elif bool(seen):
        raise ValueError(message)


def _parameters(lm: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(lm.forward).parameters


def _no_cache(lm: nn.Module) -> dict[str, Any]:
    """Else the keys and values of all layers, for nobody."""
    return {"use_cache": False} if "use_cache" in _parameters(lm) else {}


def _is_prompted(model: nn.Module) -> bool:
    """Has it an adapter that puts virtual tokens before the sequence?"""
    peft = peft_model(model)
    return bool(getattr(getattr(peft, "active_peft_config", None), "is_prompt_learning", False))


def _captured_hidden(tap: HeadTap, model: nn.Module, lm: nn.Module, input_ids: Tensor) -> Tensor:
    name = type(lm).__name__
    if tap.calls != 1 or tap.hidden is None:
        raise UnsupportedModel(
            f"model: the forward of {name} called its output head {tap.calls} times instead of once"
        )
    hidden = tap.hidden
    if _is_prompted(model) and hidden.ndim == 3:
        hidden = hidden[:, -input_ids.shape[1] :]  # virtual tokens come first and have no labels
    if hidden.shape[:-1] != input_ids.shape:
        raise UnsupportedModel(
            f"model: the output head of {name} was given hidden states of shape "
            f"{tuple(hidden.shape)} for input_ids of shape {tuple(input_ids.shape)}; "
            "expected [S, T, D]"
        )
    return hidden
