"""Token log-probabilities under a head that stays sharded over processes with rows of their own:
`operator.token_logps` on everyone's rows, between a gathering of rows and a taking of one's own
(`distributed.sharded`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Head
from ..distributed.sharded import Owners, ShardedHead
from . import operator
from .autograd import differentiable_once
from .call import Call
from .results import LinearLogps
from .rows import Rows


def exchanged(found: Rows, call: Call) -> Rows:
    """Once for policy and reference."""
    if call.sharded_head is None:
        return found
    return dataclasses.replace(found, exchange=call.sharded_head.exchange(found.labels))


def token_logps(
    hidden: Tensor,  # [M, D]
    head: Head,  # this process's rows
    found: Rows,
    call: Call,
) -> LinearLogps:  # [N] each, of this process's rows that carry loss
    shared, exchange = call.sharded_head, found.exchange
    assert shared is not None
    assert exchange is not None
    x = found.gather(hidden)
    x = x if call.compute_dtype is None else x.to(call.compute_dtype)  # fewer bytes are sent
    x = _Gathered.apply(x, exchange.owners)
    bias = None if head.bias is None else _Mean.apply(head.bias, shared)
    tokens = operator.token_logps(
        x,
        dataclasses.replace(head, weight=_Mean.apply(head.weight, shared), bias=bias),
        Rows(exchange.labels, None, exchange.labels.shape, found.vocab_size),
        dataclasses.replace(call, sharded_head=None, vocab_parallel=exchange.owners),
    )
    own = {n: _Own.apply(t, exchange.owners) for n, t in tokens._asdict().items() if t is not None}
    return LinearLogps(**own)


class _Gathered(torch.autograd.Function):
    """Everyone's rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, owners: Owners) -> Tensor:  # [N, D] -> [M, D]
        ctx.owners = owners
        whole = owners.gathered(values)
        return whole.clone() if whole is values else whole

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.owners.own].clone(), None  # which `Owners.hidden_grad` has added up


class _Own(torch.autograd.Function):
    """This process's of everyone's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, owners: Owners) -> Tensor:  # [M] -> [N]
        ctx.owners = owners
        return values[owners.own].clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.owners.gathered(grad), None


class _Mean(torch.autograd.Function):
    """A parameter whose gradient is the mean over the processes, as FSDP's is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shared: ShardedHead) -> Tensor:
        ctx.shared = shared
        return value.view_as(value)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shared.mean(grad), None
