"""What an lm_head is: the map from hidden states to logits, described once and passed around.

The logits of one row of hidden states are

    u = scale · (hidden · weightᵀ + bias)
    z = softcap(u) / temperature          softcap(u) = cap · tanh(u / cap), or u where there is no
    cap

and every backend computes exactly this. The derivative that the gradient products need is

    ∂z/∂(hidden · weightᵀ + bias) = gain · d,   gain = scale / temperature,   d = 1 − (z ·
    temperature / cap)²

with d = 1 where there is no cap: `gain` is a constant and `d` depends on the logit alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """An lm_head and what its model does to the logits."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def gain(self) -> float:
        """∂z/∂(hidden · weightᵀ + bias) before the softcap's own factor."""
        return self.scale / self.temperature

    def columns(self, start: int, stop: int) -> Head:
        """The same head over the vocabulary entries [start, stop) (views, no copy)."""
        if start == 0 and stop == self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[start:stop]
        return dataclasses.replace(self, weight=self.weight[start:stop], bias=bias)

    def softcap_derivative(self, logits: Tensor) -> Tensor | None:
        """d = 1 − tanh² of final logits z (any shape), or None where there is no softcap (d =
        1).
        """
        if self.softcap is None:
            return None
        return 1.0 - (logits * (self.temperature / self.softcap)).square_()
