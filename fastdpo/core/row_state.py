"""What the schedule knows of a row: its label's logit, its anchor and its sum (equations (1) to (3)
of `linear`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Head

# Rows are anchored at their label (δ = 0), or where it is very unlikely at their maximum (δ > 40):
# the latter are far, and log(1 + e^δ S) is taken in the log domain.
FAR = 20.0
_HALF_LOG_SUM = 10 * math.log(2.0)


class RowState(NamedTuple):
    """What the backward must know of each row, [N] each."""

    target: Tensor  # a
    anchor: Tensor  # α
    sum: Tensor  # S
    reanchored: Tensor  # bool: did this process anchor the row at its maximum?

    def packed(self) -> Tensor:  # [3, N]
        """The flag as the sum's sign."""
        return torch.stack(
            (self.target, self.anchor, torch.where(self.reanchored, -self.sum, self.sum))
        )

    @classmethod
    def unpacked(cls, packed: Tensor) -> RowState:  # [3, N]
        target, anchor, signed = packed
        return cls(target, anchor, signed.abs(), signed.signbit())

    @property
    def inverse(self) -> Tensor:
        """r of equation (2)."""
        return 1.0 / (torch.exp(self.target - self.anchor) + self.sum)


def logps_of(state: RowState) -> Tensor:
    """Equation (1), in the form that holds at each distance."""
    delta = state.anchor - state.target
    near = torch.log1p(torch.exp(delta.clamp(max=FAR)) * state.sum)
    far = torch.nn.functional.softplus(delta + torch.log(state.sum))
    return -torch.where(delta <= FAR, near, far)


def label_entry_of(state: RowState, head: Head) -> Tensor:
    """E_y = −S · d_y."""
    derivative = head.softcap_derivative(state.target)
    return -state.sum if derivative is None else -state.sum * derivative


def set_label_entries(e: Tensor, labels: Tensor, entry: Tensor) -> None:
    """E[t, y_t] = entry_t, where the label is among E's columns."""
    column = labels.clamp(0, e.shape[1] - 1).unsqueeze(1)
    inside = column == labels.unsqueeze(1)
    e.scatter_(1, column, torch.where(inside, entry.to(e.dtype).unsqueeze(1), e.gather(1, column)))


def renormalized(state: RowState) -> RowState:
    """The same rows, anchored so that S = 2^10: E then fits fp16 from 2^10 down to 2^-34 of the
    sum.
    """
    shift = torch.log(state.sum.clamp_min(torch.finfo(state.sum.dtype).tiny)) - _HALF_LOG_SUM
    return RowState(
        state.target,
        state.anchor + shift,
        torch.full_like(state.sum, math.exp(_HALF_LOG_SUM)),
        state.reanchored,
    )
