"""What stands in an output head's place for the duration of one forward.

A `HeadTap` calls the real head with a forward of its own: that keeps its input, after every hook on
the head, and multiplies zero rows of it (or the probe's). A module rather than a forward hook,
because torch.compile guards on modules and not on hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.vocabulary import VocabParallel
from . import probe
from .heads import multiplier
from .unwrap import UnsupportedModel


class HeadTap(nn.Module):
    """Stands in for an output head: keeps the input, gives the real head no rows (or the
    probe's)."""

    def __init__(self, head: nn.Module, probing: bool, spread: VocabParallel | None):
        super().__init__()
        self.head = head
        self.training = head.training  # the model may ask
        self.probing = probing
        self.spread = spread
        # What multiplies, with the forward that it has; `multiply` takes that forward's place.
        self.inner = multiplier(head)
        self.inner_forward: Callable[..., Any] = self.inner.forward
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
        if self.spread is None:
            return self.head(hidden)
        # Hooks turn the input of a head under tensor parallelism into a DTensor, and one of no rows
        # cannot be multiplied.
        self.keep(hidden)
        if self.rows is not None:
            return self.head(self.rows)
        return hidden.new_empty(*hidden.shape[:-2], 0, self.spread.vocab_size)

    def multiply(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise UnsupportedModel(
                "model: its output head should be given hidden states and nothing else, got "
                f"{len(args)} more arguments and {sorted(kwargs)}"
            )
        self.keep(hidden)
        return self.inner_forward(hidden[..., :0, :] if self.rows is None else self.rows)

    def keep(self, hidden: Tensor) -> None:
        self.calls += 1
        self.hidden = hidden
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            self.autocast_dtype = torch.get_autocast_dtype(device_type)
        if self.probing:
            self.rows = probe.probe_rows(hidden)


class Tapped:
    """A language model with its head tapped, for the time of a `with`.

    None of this is the compiler's business where it compiles a forward that calls `capture`.
    """

    @torch.compiler.disable
    def __init__(self, lm: nn.Module, head: nn.Module, probing: bool, spread: VocabParallel | None):
        self.head = head
        self.tap = HeadTap(head, probing, spread)
        # An adapter's dropout would answer for its own noise. The rest of the head keeps its mode:
        # its hooks may look at it.
        modules = head.modules() if probing else ()
        self.quiet = [m for m in modules if isinstance(m, nn.Dropout) and m.training]
        self.places = [
            (module, name)
            for module in lm.modules()
            for name, child in module._modules.items()
            if child is head
        ]
        self.attributes = vars(self.tap.inner)
        self.before = {k: v for k, v in self.attributes.items() if k == "forward"}

    @torch.compiler.disable
    def __enter__(self) -> HeadTap:
        for dropout in self.quiet:
            dropout.training = False
        for module, name in self.places:
            module._modules[name] = self.tap
        if self.tap.spread is None:
            self.attributes["forward"] = self.tap.multiply
        return self.tap

    @torch.compiler.disable
    def __exit__(self, *exception: object) -> None:
        for dropout in self.quiet:
            dropout.training = True
        for module, name in self.places:
            module._modules[name] = self.head
        self.attributes.pop("forward", None)
        self.attributes.update(self.before)
