"""What a backend is: the primitives, what goes into them and what comes out.

A backend is a module with these functions. They are pure, know nothing of autograd, losses or
users, and every tensor they are given has been checked. N is the number of rows that carry loss, V
the vocabulary (or a tile of it), D the hidden size; "accumulate dtype" is fp64 for fp64 inputs,
else fp32. Where a head has columns kept apart (`Head.extra` [V, r]), D counts them: hidden's last r
columns are theirs. A backend whose `TAKES_EXTRA` is False is given such heads joined.

`target_logits(hidden [N, D], head, labels [N]) -> a [N]`
    The label's own logit, a_t = z_t[y_t], in the accumulate dtype.

`exp_logits(hidden [N, D], head, labels [N], anchor [N], *, fixed_anchor=False, reanchored=None,
out=None, label_entry=None, stats=(), tolerance=None) -> ExpSums`
    One product and its epilogue over every entry v of `head` except the label:

        e_tv = exp(z_tv − anchor_t)          S_t = Σ_{v ≠ y_t} e_tv

    `labels` outside [0, V) mean that the row's label lies in another tile of the vocabulary. Unless
    `fixed_anchor`, a row with S_t > REANCHOR_ABOVE (or not finite) is done again with anchor_t :=
    max_{v ≠ y_t} z_tv, which is exact for any logits; the anchors used come back (−∞, with E and
    sums of 0, where every entry is −∞). With `fixed_anchor`, `reanchored` [N] bool names the rows
    that were done again when their anchors were found: their logits are summed by the same
    operations as then, since another order of the sum over D is a rounding of the logit, and one
    of e relative to 1. `out` [N, K], K ≤ V, receives E_tv = e_tv · d_tv of the first K entries (d
    is the softcap's derivative, 1 without one) in its own dtype, with `label_entry_t` (0 where
    None) in the label's column. `stats` asks for more sums, see ExpSums.

    The label is the first maximum of the row's logits where own ≥ top and own > earlier. This is
    exact for equal rows of the head: within `tolerance` [N] of the label's logit, which is then
    `anchor`, wherever the label lies, logits are summed once more, all in one order. (None: 0.)

`logits_logps(logits [N, V], labels [N], logit_map) -> (logps [N], lse [N, 2])`
    Materialized logits, read once, and what is still to be done to them.
    The row's log-sum-exp comes in two terms, its largest logit and log Σ exp(z − that): their sum
    would lose what logits with a large common part have left, in the gradient above all. Rows whose
    label is negative carry no loss: they are not read, logps and lse are 0.

`logits_logps_backward(grad_logps [N], logits [N, V], labels [N], lse [N, 2], logit_map,
out [N, V]) -> None`
    out_tv = grad_t · ∂logp_t/∂logits_tv, in out's dtype; `out` may be `logits` itself. Rows
    whose label is negative are written as zeros.

`sequence_loss(logps [N], offsets [2B + 1], ref_logps [2B], beta, label_smoothing, average, pairs)
-> SequenceLoss`
    Sequence s owns logps[offsets[s]:offsets[s + 1]]; `pairs` is "concatenated" or
    "interleaved". The DPO sigmoid loss with label smoothing, the mean over B pairs, and what its
    backward needs.

A backend module also says what it can do: `PRIMITIVES` (a frozenset of the names above that it
implements), `available() -> (bool, reason)` for this machine, and `supports(device, dtype) ->
(bool, reason)`.

The gradient products on E are plain matrix products and live with the schedule, in
`fastdpo.core.linear`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Anchored at the label's own logit, e = exp(z − a) fits fp32 and bf16 from e^-87 to e^+88. A row
# whose sum exceeds e^60 has a label at probability below e^-60 and is anchored at its maximum
# instead.
REANCHOR_ABOVE = 1.1420073898156842e26
# Σ e² is kept as Σ (e · e^-22)², which neither underflows nor overflows for sums up to
# REANCHOR_ABOVE.
COLLISION_SHIFT = -22.0


class ExpSums(NamedTuple):
    """What `exp_logits` sums over v ≠ y, each [N] in the accumulate dtype; None where not asked
    for.
    """

    anchor: Tensor
    sum: Tensor  # Σ e
    entropy: Tensor | None = None  # Σ e · (z − anchor), for stats "entropy"
    collision: Tensor | None = None  # Σ (e · e^COLLISION_SHIFT)², for stats "log_sum_sq_probs"
    logits: Tensor | None = None  # Σ z, for stats "mean_logits"
    top: Tensor | None = None  # max z, for stats "is_top1", as are the next
    own: Tensor | None = None  # z_y, −∞ where the label lies in another tile
    earlier: Tensor | None = None  # top, if an entry before the label attains it; no more than that


# Of each statistic.
FIELDS = {
    "entropy": ("entropy",),
    "log_sum_sq_probs": ("collision",),
    "mean_logits": ("logits",),
    "is_top1": ("top", "own", "earlier"),
}


class SequenceLoss(NamedTuple):
    """What `sequence_loss` returns, in the accumulate dtype."""

    loss: Tensor  # [] the mean over pairs
    logps: Tensor  # [2B] sums, or averages where asked
    rewards: Tensor  # [2B] beta · (logps − ref_logps)
    coefficients: Tensor  # [2B] ∂loss/∂logp of each token of the sequence


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LogitMap:
    """What is done to the logits u of a product (or to those that a model returned):

        z = softcap(scale · u) / temperature      softcap(u) = cap · tanh(u / cap), u without one

    The derivative that the gradients need is ∂z/∂u = gain · d with gain = scale / temperature and
    d = 1 − (z · temperature / cap)², 1 where there is no cap: `gain` is a constant and d depends on
    the logit alone.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def gain(self) -> float:
        """∂z/∂u before the softcap's own factor."""
        return self.scale / self.temperature

    def softcap_derivative(self, logits: Tensor) -> Tensor | None:
        """d of final logits z (any shape), or None where there is no softcap (d = 1)."""
        if self.softcap is None:
            return None
        return 1.0 - (logits * (self.temperature / self.softcap)).square_()


@dataclass(frozen=True)
class Head:
    """An lm_head and what its model does to the logits: hidden states to z = map(hidden · weightᵀ +
    bias).
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    # More columns of the weight, kept apart from it: hidden is then [N, D + r]. LoRA's B, beside a
    # weight that nobody wants to copy, or to have the gradient of.
    extra: Tensor | None = None  # [V, r]

    @property
    def logit_map(self) -> LogitMap:
        return LogitMap(self.scale, self.softcap, self.temperature)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def gain(self) -> float:
        return self.logit_map.gain

    def columns(self, start: int, stop: int) -> Head:
        """The same head over the vocabulary entries [start, stop) (views, no copy)."""
        if start == 0 and stop == self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[start:stop]
        extra = None if self.extra is None else self.extra[start:stop]
        return dataclasses.replace(self, weight=self.weight[start:stop], bias=bias, extra=extra)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.extra is None else (self.weight, self.extra)

    def parts(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:  # [N, D + r]
        """(like [N, D], weight [V, D]) and, where there are more columns, (like [N, r], extra)."""
        if self.extra is None:
            return [(like, self.weight)]
        size = self.weight.shape[1]
        return [(like[:, :size], self.weight), (like[:, size:], self.extra)]

    def joined(self) -> Head:
        """The same head with one weight [V, D + r]: a copy, where it is not one already."""
        if self.extra is None:
            return self
        return dataclasses.replace(self, weight=torch.cat(self.weights, 1), extra=None)

    def softcap_derivative(self, logits: Tensor) -> Tensor | None:
        return self.logit_map.softcap_derivative(logits)
