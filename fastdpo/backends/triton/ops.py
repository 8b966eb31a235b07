"""The primitives as `torch.library` ops, opaque to torch.compile, known to it.

A `Head` travels as (weight, bias, scale, softcap, temperature), the statistics as one
comma-separated string. Ops return new tensors and write only what they declare, so that opcheck
passes; the functions of the contract (`fastdpo.backends.triton`) are thin wrappers around these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...names import TRITON
from ..contract import FIELDS, Head, LogitMap, SequenceLoss
from . import row_launches
from .autotune import tile_of
from .exp_logits import Asked, prepare
from .launch import run, target_of


@torch.library.custom_op(f"{TRITON}::target_logits", mutates_args=())
def target_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    temperature: float,
    labels: Tensor,  # [N]
) -> Tensor:  # [N] fp32
    logits = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if logits.numel():
        head = Head(weight, _dense(bias), scale, softcap, temperature)
        run([row_launches.target_logits(hidden, head, labels.contiguous(), logits)], hidden.device)
    return logits


@target_logits.register_fake
def _(hidden, weight, bias, scale, softcap, temperature, labels):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op(f"{TRITON}::exp_logits", mutates_args=("out",))
def exp_logits(  # many parameters: an operator takes no objects
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    temperature: float,
    labels: Tensor,  # [N]
    anchor: Tensor,  # [N] fp32
    fixed_anchor: bool,
    reanchored: Tensor | None,  # [N] bool
    out: Tensor | None,  # [N, K]
    label_entry: Tensor | None,  # [N] fp32
    stats: str,
    tolerance: Tensor | None,  # [N] fp32
) -> tuple[Tensor, Tensor]:  # [N], [P, N]
    """(anchor used, the sums in the order of `ExpSums`); with a fixed anchor the first is empty."""
    names = tuple(filter(None, stats.split(",")))
    if hidden.shape[0] == 0:
        return _exp_logits_fake(
            hidden, weight, bias, scale, softcap, temperature, labels, anchor, fixed_anchor,
            reanchored, out, label_entry, stats, tolerance,
        )  # fmt: skip
    head = Head(weight, _dense(bias), scale, softcap, temperature)
    labels, anchor = labels.contiguous(), anchor.contiguous()
    launches = []
    label_logits = None
    if "mean_logits" in names:
        label_logits = torch.empty_like(anchor)
        launches.append(row_launches.target_logits(hidden, head, labels, label_logits))
    target = target_of(hidden)
    tile = tile_of(hidden, head, target)
    asked = Asked(
        hidden, head, labels, anchor, fixed_anchor,
        None if reanchored is None else reanchored.to(torch.int8).contiguous(),
        out, _dense(label_entry), names, label_logits,
        torch.zeros_like(anchor) if tolerance is None else tolerance.contiguous(),
    )  # fmt: skip
    prepared = prepare(asked, target, tile)
    run(launches + prepared.launches, hidden.device)
    sums = prepared.sums
    if prepared.ties is not None:
        top, earlier = prepared.ties.settled.view(2, -1, anchor.shape[0]).amax(1)
        # What was close is settled, and all the rest is as the product has it: no entry that could
        # be the label's equal.
        top = torch.where(top == -torch.inf, sums[-1], top)
        sums = torch.cat([sums[:-1], torch.stack([top, prepared.ties.own, earlier])])
    return anchor.new_empty(0) if fixed_anchor else prepared.anchor, sums


@exp_logits.register_fake
def _exp_logits_fake(
    hidden,
    weight,
    bias,
    scale,
    softcap,
    temperature,
    labels,
    anchor,
    fixed_anchor,
    reanchored,
    out,
    label_entry,
    stats,
    tolerance,
):
    rows = hidden.shape[0]
    quantities = 1 + sum(len(FIELDS[name]) for name in filter(None, stats.split(",")))
    return anchor.new_empty(0 if fixed_anchor else rows), anchor.new_empty(quantities, rows)


@torch.library.custom_op(f"{TRITON}::logits_logps", mutates_args=())
def logits_logps(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [N], [N, 2] fp32
    logps = logits.new_empty(logits.shape[0], dtype=torch.float32)
    lse = logits.new_empty(logits.shape[0], 2, dtype=torch.float32)
    if logps.numel():
        logit_map = LogitMap(scale, softcap, temperature)
        launch = row_launches.logits_logps(logits, labels.contiguous(), logit_map, logps, lse)
        run([launch], logits.device)
    return logps, lse


@logits_logps.register_fake
def _(logits, labels, scale, softcap, temperature):
    logps = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return logps, logits.new_empty(logits.shape[0], 2, dtype=torch.float32)


@torch.library.custom_op(f"{TRITON}::logits_logps_backward", mutates_args=("out",))
def logits_logps_backward(
    grad_logps: Tensor,  # [N]
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2] fp32
    scale: float,
    softcap: float | None,
    temperature: float,
    out: Tensor,  # [N, V]
) -> None:
    _backward(grad_logps, logits, labels, lse, scale, softcap, temperature, out)


@logits_logps_backward.register_fake
def _(grad_logps, logits, labels, lse, scale, softcap, temperature, out):
    return None


@torch.library.custom_op(f"{TRITON}::logits_logps_backward_", mutates_args=("logits",))
def logits_logps_backward_(
    grad_logps: Tensor,  # [N]
    logits: Tensor,  # [N, V], becomes its own gradient
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2] fp32
    scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """In place. An op of its own, since an op's mutated argument may not be another argument's
    storage.
    """
    _backward(grad_logps, logits, labels, lse, scale, softcap, temperature, logits)


@logits_logps_backward_.register_fake
def _(grad_logps, logits, labels, lse, scale, softcap, temperature):
    return None


def _backward(
    grad_logps: Tensor,  # [N], any stride
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2]
    scale: float,
    softcap: float | None,
    temperature: float,
    out: Tensor,  # [N, V]
) -> None:
    if not out.numel():
        return
    logit_map = LogitMap(scale, softcap, temperature)
    grad = grad_logps.to(torch.float32).contiguous()  # N numbers, perhaps expanded from one
    labels, lse = labels.contiguous(), lse.contiguous()
    launch = row_launches.logits_logps_backward(grad, logits, labels, lse, logit_map, out)
    run([launch], out.device)


def _dense(values: Tensor | None) -> Tensor | None:  # [K]
    """The kernels know no strides of vectors."""
    return None if values is None else values.contiguous()


@torch.library.custom_op(f"{TRITON}::sequence_loss", mutates_args=())
def sequence_loss(
    logps: Tensor,  # [N]
    offsets: Tensor,  # [2B + 1]
    ref_logps: Tensor,  # [2B]
    beta: float,
    label_smoothing: float,
    average: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [2B], [2B], [2B]
    sums = logps.new_empty(ref_logps.shape)
    rewards, coefficients = torch.empty_like(sums), torch.empty_like(sums)
    if sums.numel() == 0:
        return logps.new_zeros(()), sums, rewards, coefficients
    loss = logps.new_empty(())
    launch = row_launches.sequence_loss(
        logps.contiguous(),
        offsets.contiguous(),
        ref_logps.contiguous(),
        beta,
        label_smoothing,
        average,
        interleaved,
        SequenceLoss(loss, sums, rewards, coefficients),
    )
    run([launch], logps.device)
    return loss, sums, rewards, coefficients


@sequence_loss.register_fake
def _(logps, offsets, ref_logps, beta, label_smoothing, average, interleaved):
    sums = logps.new_empty(ref_logps.shape)
    return logps.new_empty(()), sums, torch.empty_like(sums), torch.empty_like(sums)
