"""Padding on the left: position_ids that do not count it, and a refusal where that does not help.

A token's position is its place among the tokens, as in generation. Whether a model is told
positions, and whether it is then right, is what `fastdpo.integrations.order` found out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .order import Order, positions


def placed(
    order: Order,
    name: str,  # the model's class
    attention_mask: Tensor,  # [S, T]
    position_ids: Tensor | None,
    prompted: bool,  # virtual tokens come first (prompt learning)
) -> Tensor | None:  # [S, T] the position_ids to give to the model
    """Nothing waits for a GPU: there, padding that the model cannot serve trips an assertion.

    Raises:
        ValueError: there is padding on the left (or between tokens), and the model's answer would
            depend on it.
    """
    if prompted or not order.left_padding:
        why = "puts virtual tokens before the padding" if prompted else "cannot leave it out"
        _refuse_left(attention_mask, f"padded on the right: {name} {why}")
    if position_ids is not None or prompted or order.position_offset is None:
        return position_ids
    return positions(attention_mask, order.position_offset)


def _refuse_left(attention_mask: Tensor, should: str) -> None:
    seen = attention_mask.bool()
    after_padding = seen[:, 1:] & ~seen[:, :-1]
    message = f"attention_mask should be {should}; got a token after padding"
    if attention_mask.device.type != "cpu":
        torch._assert_async(~after_padding.any(), message)
    elif bool(after_padding.any()):
        raise ValueError(message)
