"""Runs a model up to its lm_head, computes an answer there, and lets it leave through the model's
output: a model's forward that returns log-probabilities or a loss instead of logits.

Everything before the head (and around it: wrappers, hooks, a scaling of the hidden states, BERT's
transform) runs as the model wrote it; `fastdpo.integrations.tap` says how the answer gets in and
out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from . import probe
from .batches import IGNORE_INDEX
from .heads import HeadReader
from .order import UNKNOWN, Order, order_of
from .positions import placed
from .subject import Subject, subject_of
from .tap import Answer, Answers, HeadTap, Tapped
from .unwrap import UnsupportedModel, causal_lm, disabled_prompt, is_prompted, sharding

AUX_LOSS = "aux_loss"  # [] among the answers: the balancing loss of a mixture of experts


class _Prepared(NamedTuple):
    """What is known before a forward."""

    reader: HeadReader
    subject: Subject
    probing: bool
    prompted: bool
    model_kwargs: dict[str, Any]


# Where torch.compile compiles a forward that calls this one, it goes on at the model's own forward.
@torch.compiler.disable(recursive=False)
def answered(
    model: nn.Module,
    input_ids: Tensor,  # [S, T]
    attention_mask: Tensor | None = None,  # [S, T]
    *,
    answer: Answer,
    in_order: bool = True,
    **model_kwargs: Any,
) -> Answers:
    """One forward of `model`, which returns what `answer` makes of its hidden states and its head,
    and `AUX_LOSS` where the model has one.

    Without `in_order` the model is not asked what it does with the order of its tokens (its rows
    are parts of sequences, and it knows where they belong from position_ids).

    Raises:
        ValueError: the model cannot be right about the padding, or is given a second sequence.
        UnsupportedModel: the head cannot be described, or is not what the description says; or the
            model is not causal.
    """
    model_kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    prepared = _prepared(model, input_ids, None, in_order, model_kwargs)
    tap = _tap(prepared, answer, input_ids.shape)
    lm: Any = prepared.reader.lm
    own_forward = lm.forward

    @functools.wraps(own_forward)
    def lm_forward(*args: Any, **kwargs: Any) -> Answers:
        return _leaving(tap, prepared, own_forward(*args, **kwargs))

    forwards: list[tuple[nn.Module, Callable[..., Any]]] = [(lm, lm_forward)]
    disabled = disabled_prompt(model)
    if disabled is not None:
        # PEFT has put the forward that the base had in its own place: the base is to be called,
        # whose forward is another now.
        forwards.append((disabled, functools.partial(_forward_of, disabled.base_model)))
    call = functools.partial(model, **prepared.model_kwargs)
    with Tapped(tap, forwards):
        found = _eagerly(call) if prepared.probing else call()
    return _arrived(tap, prepared, found)


def _forward_of(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return base(*args, **kwargs)


# As above: of a forward that is compiled, what it calls is.
@torch.compiler.disable(recursive=False)
def answered_inside(
    lm: nn.Module,
    like: Tensor,  # [S, T] of the tokens' shape and device
    *,
    answer: Answer,
    forward: Callable[..., Any],
    in_order: bool = True,
    **model_kwargs: Any,  # input_ids or inputs_embeds among them
) -> Answers:
    """`answered`, for a forward that takes the place of the language model's own: calls `forward`,
    which is the one that it had, and returns the answers.

    Calling the model there would enter its wrappers a second time, accelerate's autocast among
    them, which does not survive that. Whoever replaces the forward returns the answers from it.
    """
    prepared = _prepared(lm, like, forward, in_order, model_kwargs)
    tap = _tap(prepared, answer, like.shape)
    call = functools.partial(forward, **prepared.model_kwargs)
    with Tapped(tap):
        outputs = _eagerly(call) if prepared.probing else call()
    return _leaving(tap, prepared, outputs)


@torch.compiler.disable
def _prepared(
    model: nn.Module,
    like: Tensor,  # [S, T] of the tokens' shape and device
    forward: Callable[..., Any] | None,
    in_order: bool,
    model_kwargs: dict[str, Any],
) -> _Prepared:
    lm = causal_lm(model)
    reader, prompted = HeadReader.of(lm), is_prompted(model)
    mask = model_kwargs.get("attention_mask")
    order = None
    if in_order:
        asked = {k: v for k, v in model_kwargs.items() if k not in _GIVEN}
        order = examine(model, like.device, forward=forward, **asked)
    if mask is not None and order is not None:
        # Inside a prompt-learning adapter's forward the virtual tokens are there already.
        inside = model_kwargs.get("input_ids") is None or mask.shape != like.shape
        place = placed(
            order,
            type(lm).__name__,
            mask,
            model_kwargs.get("position_ids"),
            prompted or inside,
        )
        if place is not None:
            model_kwargs["position_ids"] = place
    model_kwargs = {k: v for k, v in model_kwargs.items() if v is not None or k not in _GIVEN}
    model_kwargs = {**_no_cache(lm), **model_kwargs}
    head, device_type, inside = reader.layers[0], like.device.type, forward is not None
    subject = subject_of(model, head, reader.rule, device_type, model_kwargs, inside)
    probing = like.numel() > 0 and not probe.is_verified(head, subject)
    return _Prepared(reader, subject, probing, prompted, model_kwargs)


_GIVEN = ("input_ids", "attention_mask")  # to whatever model


def _tap(prepared: _Prepared, answer: Answer, shape: torch.Size) -> HeadTap:
    return HeadTap(
        prepared.reader,
        answer,
        shape,
        prompted=prepared.prompted,
        probing=prepared.probing,
    )


@torch.compiler.disable
def _eagerly(call: Callable[[], Any]) -> Any:
    """A probe's forward happens once: torch.compile would compile it for that once, and count it
    among the variants of a model that it is willing to compile."""
    with torch.compiler.set_stance("force_eager"):
        return call()


def _leaving(tap: HeadTap, prepared: _Prepared, outputs: Any) -> Answers:
    """What a forward that was tapped returns: a plain dict, whose tensors every wrapper finds."""
    if tap.answers is None:
        raise UnsupportedModel(
            f"model: the forward of {type(prepared.reader.lm).__name__} called its output head "
            f"{tap.calls} times instead of once"
        )
    if tap.probed is not None:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        lm = prepared.reader.lm
        probe.verify(tap.head, lm, tap.probed, logits, prepared.subject)
    found = dict(tap.answers)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is not None:
        boxed = not torch.compiler.is_compiling()
        found[AUX_LOSS] = tap.depart(AUX_LOSS, aux_loss) if boxed else aux_loss
    return found


def _arrived(tap: HeadTap, prepared: _Prepared, found: Answers) -> Answers:
    """What came out of the model, and exact whatever its wrappers did to it."""
    if not isinstance(found, dict):
        raise UnsupportedModel(
            f"model: the forward of {type(prepared.reader.lm).__name__} should return what its "
            f"language model's forward returned, got a {type(found).__name__}: a wrapper changes it"
        )
    for name, value in found.items():
        if name in tap.exact:
            found[name] = tap.exact[name].arrive(value)
        elif value.is_floating_point() and value.element_size() == 2 and name != AUX_LOSS:
            raise UnsupportedModel(
                f"model: its wrappers round what leaves it to {value.dtype}, and torch.compile "
                "hides the exact values; set output_dtype=None in fully_shard's "
                "MixedPrecisionPolicy, or compile the layers instead of the model"
            )
    return found


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
    listen = listener(model, forward)

    def ask(typed: bool) -> Order:
        def run(ids: Tensor, mask: Tensor, position_ids: Tensor | None) -> Tensor | None:
            given = {} if position_ids is None else {"position_ids": position_ids}
            if typed:
                given["token_type_ids"] = torch.ones_like(ids)
            return listen(input_ids=ids, attention_mask=mask, **given)

        takes = takes_positions(lm)
        return order_of(lm, run, takes_positions=takes, typed=typed, device=device)

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


def listener(
    model: nn.Module,
    forward: Callable[..., Any] | None = None,  # in place of the model's own
) -> Callable[..., Tensor | None]:
    """A forward of the model that returns the hidden states [S, T, D] that its head was given; None
    where they are of another shape."""
    lm = causal_lm(model)
    reader = HeadReader.of(lm)
    # What gathers parameters has to be called for that; else the prompts of a prompt-learning
    # adapter are better left out.
    wrapper = sharding(model) if forward is None else None
    prompted = wrapper is not None and is_prompted(model)

    def listen(*, input_ids: Tensor, **inputs: Any) -> Tensor | None:
        with Tapped(HeadTap(reader, None, input_ids.shape, prompted=prompted)) as tap:
            (forward or wrapper or lm)(input_ids=input_ids, **inputs, **_no_cache(lm))
        return tap.hidden

    return listen


def takes_positions(lm: nn.Module) -> bool:
    return "position_ids" in _parameters(lm)


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
