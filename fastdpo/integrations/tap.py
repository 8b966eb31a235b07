"""What stands in an output head's place for the duration of one forward: the answer is computed
inside the head's own call, and leaves through the model's output.

    model(...)                        every wrapper and its hooks: DDP, FSDP, ZeRO, PEFT, compile
      lm.forward                      its output is replaced by the answer
        HeadTap(hidden)               hands the model's forward logits of no rows
          head(hidden)                every hook on the head: its weight is gathered, and cast
            multiply(hidden)          hidden states and weight to the answer

Wrappers gather what a forward needs around the calls of modules, and hang what a backward needs on
the outputs of modules. A loss that is computed elsewhere, from hidden states that were put aside,
finds a weight that is gone, or gradients that nobody averages.

Replaced are the head, by a module rather than by a hook, because torch.compile guards on modules
and not on hooks; and two forwards, as attributes of their modules, where a module's call looks
first. All of it outside of what torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.contract import Head
from ..distributed.exact import Exact
from ..distributed.vocabulary import VocabParallel
from . import probe
from .heads import HeadReader
from .tensor_parallel import spread_by_hooks
from .unwrap import UnsupportedModel


class AtHead(NamedTuple):
    """What an output head has, while it is called."""

    hidden: Tensor  # [S, T, D] its input
    head: Head
    vocab_parallel: VocabParallel | None  # where head is this process's rows
    chooses_dtype: bool = False  # has the layer chosen the dtype of the product, over autocast?

    @property
    def vocab_size(self) -> int:
        spread = self.vocab_parallel
        return self.head.vocab_size if spread is None else spread.vocab_size


Answers = dict[str, Tensor]
Answer = Callable[[AtHead], Answers]


class HeadTap(nn.Module):
    """Stands in for an output head. Its input goes to `answer`; the real head gets no rows of it
    (or the probe's).
    """

    def __init__(
        self,
        reader: HeadReader,
        answer: Answer | None,  # None: only listen
        shape: torch.Size,  # [S, T] of the tokens
        *,
        prompted: bool = False,  # virtual tokens come before them
        probing: bool = False,
    ):
        super().__init__()
        self.reader, self.answer, self.shape = reader, answer, shape
        self.prompted, self.probing = prompted, probing
        self.head = head = reader.layers[0]
        self.training = head.training  # the model may ask
        # Its input is then no plain tensor inside the head, and cannot be one of no rows.
        self.by_hooks = spread_by_hooks(reader.lm, reader.base)
        # What multiplies, with the forward that it has; `multiply` takes that forward's place.
        own = head.__call__ if self.by_hooks else reader.layers[-1].forward
        self.logits_of: Callable[..., Any] = own
        self.hooks: list[_Hooks] = []  # the head's own, which want logits
        self.hidden: Tensor | None = None  # [S, T, D] where there is nothing to answer
        self.answers: Answers | None = None
        self.exact: dict[str, Exact] = {}
        self.probed: probe.Probed | None = None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        # Models look at their head's weight (`hidden.to(self.lm_head.weight.dtype)`).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("head"), name)

    def forward(self, hidden: Tensor) -> Tensor:
        call = self.multiply if self.by_hooks else self.head
        self.answers, logits = call(hidden)
        return logits

    def multiply(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Answers, Tensor]:
        """In the place of the forward of what multiplies."""
        self.calls += 1
        self._check(hidden, args, kwargs)
        spread = self.reader.vocab_parallel()
        logits = self._logits(hidden, spread)
        if self.answer is None:
            self.hidden = self._of_tokens(hidden)
            return {}, logits
        bound, head = self.reader.bind(hidden)
        at = AtHead(self._of_tokens(bound), head, spread, self.reader.chooses_dtype)
        answers = self.answer(at)
        if not torch.compiler.is_compiling():
            answers = {name: self.depart(name, value) for name, value in answers.items()}
        return answers, logits

    def _of_tokens(self, hidden: Tensor) -> Tensor:
        """Without virtual tokens, which have no labels."""
        return hidden[:, hidden.shape[1] - self.shape[1] :] if self.prompted else hidden

    def _logits(self, hidden: Tensor, spread: VocabParallel | None) -> Tensor:
        """The model's own, of no rows or of the probe's."""
        if self.probing:
            rows = probe.probe_rows(hidden)
            self.probed = probe.Probed.of(self.reader, rows, spread)
            # An adapter's dropout would answer for its own noise. The rest of the head keeps its
            # mode: its hooks may look at it.
            quiet = [m for m in self.head.modules() if isinstance(m, nn.Dropout) and m.training]
            for dropout in quiet:
                dropout.training = False
            try:
                return self._with_hooks(rows, self.logits_of(rows))
            finally:
                for dropout in quiet:
                    dropout.training = True
        rows = hidden[..., :0, :]
        if spread is None:
            return self._with_hooks(rows, self.logits_of(rows))
        return self._with_hooks(rows, rows.new_empty(*rows.shape[:-1], spread.vocab_size))

    def _with_hooks(self, rows: Tensor, logits: Tensor) -> Tensor:
        for hooks in self.hooks:
            logits = hooks(rows, logits)
        return logits

    def depart(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        self.exact[name] = exact = Exact(value)
        return exact.depart(value)

    def _check(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = type(self.reader.lm).__name__
        if self.calls != 1:
            raise UnsupportedModel(
                f"model: the forward of {name} called its output head {self.calls} times instead "
                "of once"
            )
        if args or kwargs:
            raise UnsupportedModel(
                "model: its output head should be given hidden states and nothing else, got "
                f"{len(args)} more arguments and {sorted(kwargs)}"
            )
        shape = hidden.shape[:-1]
        if self.prompted and hidden.ndim == 3:
            shape = torch.Size((shape[0], min(shape[1], self.shape[1])))
        if shape != self.shape:
            raise UnsupportedModel(
                f"model: the output head of {name} was given hidden states of shape "
                f"{tuple(hidden.shape)} for input_ids of shape {tuple(self.shape)}; "
                "expected [S, T, D]"
            )


class Tapped:
    """A language model with its head tapped, for the time of a `with`; `forwards` are of modules
    that have another forward for as long."""

    @torch.compiler.disable
    def __init__(self, tap: HeadTap, forwards: Iterable[tuple[nn.Module, Callable[..., Any]]] = ()):
        self.tap, self.forwards = tap, tuple(forwards)
        self.places = [
            (module, name)
            for module in tap.reader.lm.modules()
            for name, child in module._modules.items()
            if child is tap.head
        ]
        self.before: list[tuple[nn.Module, dict[str, Any]]] = []
        self.hooks: list[tuple[nn.Module, dict[int, Any]]] = []

    @torch.compiler.disable
    def __enter__(self) -> HeadTap:
        tap = self.tap
        if not tap.by_hooks:
            for layer in reversed(tap.reader.layers):
                self._take_hooks(layer)
            self._replace(tap.reader.layers[-1], tap.multiply)
        for module, name in self.places:
            module._modules[name] = tap
        for module, forward in self.forwards:
            self._replace(module, forward)
        return tap

    def _take_hooks(self, layer: nn.Module) -> None:
        own = {i: hook for i, hook in layer._forward_hooks.items() if not _gathers(hook)}
        if not own:
            return
        self.hooks.append((layer, dict(layer._forward_hooks)))
        self.tap.hooks.append(_Hooks(layer, own))
        for i in own:
            del layer._forward_hooks[i]

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        attributes = vars(module)
        self.before.append((module, {k: v for k, v in attributes.items() if k == "forward"}))
        attributes["forward"] = forward

    @torch.compiler.disable
    def __exit__(self, *exception: object) -> None:
        for module, before in reversed(self.before):
            vars(module).pop("forward", None)
            vars(module).update(before)
        for module, name in self.places:
            module._modules[name] = self.tap.head
        for layer, hooks in self.hooks:  # in their order
            layer._forward_hooks.clear()
            layer._forward_hooks.update(hooks)


class _Hooks:
    """Forward hooks that somebody put on a layer: they know logits, and not answers."""

    def __init__(self, layer: nn.Module, hooks: dict[int, Callable[..., Any]]):
        self.layer, self.hooks = layer, hooks

    def __call__(self, rows: Tensor, logits: Tensor) -> Tensor:
        for i, hook in self.hooks.items():
            kwargs: tuple[Any, ...] = ({},) if i in self.layer._forward_hooks_with_kwargs else ()
            returned = hook(self.layer, (rows,), *kwargs, logits)
            logits = logits if returned is None else returned
        return logits


def _gathers(hook: Any) -> bool:
    """Is it a hook of what shards parameters? Those look through whatever a module returns."""
    hook = getattr(hook, "func", hook)
    return (getattr(hook, "__module__", None) or "").startswith(("torch.distributed", "deepspeed"))
