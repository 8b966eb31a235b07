"""Runs a model up to its lm_head and no further: what the head would have multiplied.

For the duration of one forward the head's place in the model is taken by a `HeadTap`, which keeps
its input and lets the real head see zero rows of it. Everything before the head (and around it:
wrappers, hooks, a scaling of the hidden states, BERT's transform) runs as the model wrote it, and
the logits it returns are [.., 0, V]. A module rather than a forward hook, because torch.compile
guards on modules and not on hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.head import Head
from fastdpo.integrations import probe
from fastdpo.integrations.families import head_rule
from fastdpo.integrations.heads import bind_head, vocab_parallel
from fastdpo.integrations.unwrap import (
    UnsupportedModel,
    causal_lm,
    output_head,
    peft_model,
)
from fastdpo.parallel import VocabParallel


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


class HeadTap(nn.Module):
    """Stands in for an output head: keeps the input, gives the real head no rows (or the
    probe's)."""

    def __init__(self, head: nn.Module, probing: bool, spread: VocabParallel | None):
        super().__init__()
        self.head = head
        self.probing = probing
        self.spread = spread
        self.hidden: Tensor | None = None
        self.rows: Tensor | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        # Models look at their head's weight (`hidden.to(self.lm_head.weight.dtype)`).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("head"), name)

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = hidden
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            self.autocast_dtype = torch.get_autocast_dtype(device_type)
        if self.probing:
            self.rows = probe.probe_rows(hidden)
            return self.head(self.rows)
        if self.spread is not None:  # a DTensor of no rows cannot be multiplied
            return hidden.new_empty(*hidden.shape[:-2], 0, self.spread.vocab_size)
        return self.head(hidden[..., :0, :])


@contextmanager
def _tapped(
    lm: nn.Module, head: nn.Module, probing: bool, spread: VocabParallel | None
) -> Iterator[HeadTap]:
    tap = HeadTap(head, probing, spread)
    modes = [(module, module.training) for module in head.modules()]
    if probing:
        head.eval()  # LoRA's dropout would answer for its own noise
    places = [
        (module, name)
        for module in lm.modules()
        for name, child in module._modules.items()
        if child is head
    ]
    for module, name in places:
        module._modules[name] = tap
    try:
        yield tap
    finally:
        for module, name in places:
            module._modules[name] = head
        for module, training in modes:
            module.training = training


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
        UnsupportedModel: the head cannot be described, or is not what the description says.
    """
    lm = causal_lm(model)
    head_module = output_head(lm)
    rule, spread = head_rule(lm), vocab_parallel(lm)
    probing = input_ids.numel() > 0 and not probe.is_verified(head_module, lm, rule)
    if attention_mask is not None:
        model_kwargs["attention_mask"] = attention_mask
    if "use_cache" in inspect.signature(lm.forward).parameters:
        model_kwargs.setdefault("use_cache", False)  # keys and values of all layers, for nobody

    with _tapped(lm, head_module, probing, spread) as tap:
        outputs = (forward or model)(input_ids=input_ids, **model_kwargs)
    hidden = _captured_hidden(tap, model, lm, input_ids)
    if probing and tap.rows is not None:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        sixteen_bit = tap.autocast_dtype is not None or hidden.element_size() == 2
        if spread is not None:  # every process has all logits, and answers for its own
            logits = logits[..., spread.start :][..., : spread.sizes[spread.rank]]
        probe.verify(head_module, lm, rule, tap.rows, logits, sixteen_bit)
    hidden, head = bind_head(lm, hidden)
    return Captured(hidden, head, tap.autocast_dtype, getattr(outputs, "aux_loss", None), spread)


def _captured_hidden(tap: HeadTap, model: nn.Module, lm: nn.Module, input_ids: Tensor) -> Tensor:
    name = type(lm).__name__
    if tap.calls != 1 or tap.hidden is None:
        raise UnsupportedModel(
            f"model: the forward of {name} called its output head {tap.calls} times instead of once"
        )
    hidden = tap.hidden
    peft = peft_model(model)
    prompts = getattr(getattr(peft, "active_peft_config", None), "is_prompt_learning", False)
    if prompts and hidden.ndim == 3:
        hidden = hidden[:, -input_ids.shape[1] :]  # virtual tokens come first and have no labels
    if hidden.shape[:-1] != input_ids.shape:
        raise UnsupportedModel(
            f"model: the output head of {name} was given hidden states of shape "
            f"{tuple(hidden.shape)} for input_ids of shape {tuple(input_ids.shape)}; "
            "expected [S, T, D]"
        )
    return hidden
