"""Materialized logits to label log-probabilities: the drop-in for code that already has them.

    logp_t = z_t[y_t] − lse_t          ∂loss/∂z_tv = g_t · (1[v = y_t] − exp(z_tv − lse_t))

The forward reads the logits once and keeps two numbers a row, the two terms of lse_t; the backward
reads them once and writes the gradient once: into memory of its own, or over the logits where the
caller says that nobody needs them any more (`inplace`).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..backends import select
from ..backends.contract import LogitMap, accumulate_dtype
from ..names import NAMESPACE, ops
from . import checks
from .autograd import differentiable_once, graph_is_kept, is_traced
from .call import LossCall


def checked_labels(
    labels: Tensor,  # [...]
    ignore_index: int,
    vocab_size: int,
) -> Tensor:  # [...]
    """The labels, −1 where a row carries no loss. On a GPU this waits for the device once.

    Raises:
        ValueError: a label lies outside the vocabulary.
    """
    if is_traced(labels):
        return ops.checked_labels(labels, ignore_index, vocab_size)
    return _checked_labels(labels, ignore_index, vocab_size)


def logits_logps(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...], negative where a row carries no loss
    logit_map: LogitMap,
    backend: str | None = None,
    *,
    inplace: bool = False,
) -> Tensor:  # [...]
    """Label log-probabilities in the accumulate dtype, exactly 0 where a row carries no loss."""
    return _LogitsLogps.apply(logits, labels, logit_map, backend, inplace)


def fused_loss(logits: Tensor, backend: str | None) -> ModuleType | None:
    """The backend that takes such logits to the DPO sigmoid loss in one launch sequence, if the one
    that serves them does.
    """
    if is_traced(logits):
        return None
    module = select.primitive("logits_logps", logits, backend)
    return module if hasattr(module, "logits_sequence_loss") else None


def sigmoid_loss(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...], negative where a row carries no loss
    logit_map: LogitMap,
    offsets: Tensor,  # [2B + 1] over the M rows
    ref_logps: Tensor,  # [2B]
    loss: LossCall,  # of an objective that is the sigmoid loss
    module: ModuleType,  # of `fused_loss`
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO sigmoid loss [], the sequences' log-probabilities [2B] and their rewards [2B]
    (detached).
    """
    options = (loss.objective.beta, loss.objective.label_smoothing, loss.average, loss.pairs)
    return _LogitsLoss.apply(
        logits, labels, logit_map, offsets, ref_logps.detach(), options, module, inplace
    )


class _LogitsLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, labels: Tensor, logit_map: LogitMap, backend: str | None, inplace: bool
    ) -> Tensor:
        forward = ops.logits_logps if is_traced(logits) else _forward
        options = (logit_map.scale, logit_map.softcap, logit_map.temperature, backend)
        logps, lse = forward(logits, labels, *options)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.inplace = options, inplace
        return logps

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_logps: Tensor):
        logits, labels, lse = ctx.saved_tensors
        tensors = (grad_logps, logits, labels, lse)
        if is_traced(logits, grad_logps):  # where the gradient lies is the compiler's to plan
            grad = ops.logits_logps_backward(*tensors, *ctx.options)
        else:
            inplace = ctx.inplace and not graph_is_kept()
            grad = _backward(*tensors, *ctx.options, inplace=inplace)
        return grad, None, None, None, None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        labels: Tensor,
        logit_map: LogitMap,
        offsets: Tensor,
        ref_logps: Tensor,
        options: tuple[float, float, bool, str],
        module: ModuleType,
        inplace: bool,
    ):
        ctx.set_materialize_grads(False)
        found = module.logits_sequence_loss(
            _flattened(logits), labels.flatten(), logit_map, offsets, ref_logps, *options
        )
        ctx.save_for_backward(logits, labels, found.lse, found.row_coefficients, offsets)
        ctx.logit_map, ctx.module, ctx.inplace, ctx.average = logit_map, module, inplace, options[2]
        ctx.mark_non_differentiable(found.loss.rewards)
        return found.loss.loss, found.loss.logps, found.loss.rewards

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss: Tensor | None, grad_logps: Tensor | None, _grad_rewards):
        logits, labels, lse, grad, offsets = ctx.saved_tensors
        scale = grad_loss
        if grad_loss is None:
            grad = torch.zeros_like(grad)
        if grad_logps is not None:
            grad = grad if grad_loss is None else grad * grad_loss
            per_row = _per_row(grad_logps, labels.flatten(), offsets, ctx.average)
            grad, scale = grad + per_row, None
        inplace = ctx.inplace and not graph_is_kept()
        grad = _gradient(ctx.module, grad, logits, labels, lse, ctx.logit_map, inplace, scale)
        return grad, *(None,) * 7


def _per_row(
    grad_logps: Tensor,  # [2B]
    labels: Tensor,  # [M]
    offsets: Tensor,  # [2B + 1]
    average: bool,
) -> Tensor:  # [M]
    """∂/∂ of the sequences' sums (or averages), for each of their rows."""
    carries = (labels >= 0).to(grad_logps.dtype)
    if average:
        before = torch.nn.functional.pad(carries.cumsum(0), (1, 0))
        grad_logps = grad_logps / before[offsets].diff().clamp(min=1)
    return grad_logps.repeat_interleave(offsets.diff(), output_size=labels.numel()) * carries


def _gradient(
    module: ModuleType,
    grad: Tensor,  # [M]
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    lse: Tensor,  # [M, 2]
    logit_map: LogitMap,
    inplace: bool,
    scale: Tensor | None = None,  # [], where the module multiplies by one
) -> Tensor:  # [..., V]
    rows = _flattened(logits)
    copied = rows.data_ptr() != logits.data_ptr()  # then the copy is ours to write over
    # `rows` itself and no second view of it: a backend tells by that.
    out = rows if inplace or copied else rows.new_empty(rows.shape)
    options = {} if scale is None else {"grad_scale": scale}
    module.logits_logps_backward(grad, rows, labels.flatten(), lse, logit_map, out, **options)
    return out.view(logits.shape)


def _flattened(logits: Tensor) -> Tensor:  # [..., V] -> [M, V]
    return logits.reshape(-1, logits.shape[-1])


# ---- The same as operators, for tracers: flat arguments, shapes that follow from shapes


def _forward(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(logps [...], lse [M, 2])."""
    module = select.primitive("logits_logps", logits, backend)
    logit_map = LogitMap(scale, softcap, temperature)
    logps, lse = module.logits_logps(_flattened(logits), labels.flatten(), logit_map)
    return logps.view(labels.shape), lse


def _backward(  # many parameters: an operator takes no objects
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    backend: str | None,
    *,
    inplace: bool = False,
) -> Tensor:  # [..., V]
    module = select.primitive("logits_logps_backward", logits, backend)
    logit_map = LogitMap(scale, softcap, temperature)
    grad = grad_logps.to(lse.dtype).flatten()
    return _gradient(module, grad, logits, labels, lse, logit_map, inplace)


def _checked_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    carries, _ = checks.label_values(labels, ignore_index, vocab_size)
    return labels.masked_fill(~carries, -1)


@torch.library.custom_op(f"{NAMESPACE}::checked_labels", mutates_args=())
def _checked_labels_op(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return _checked_labels(labels, ignore_index, vocab_size)


@_checked_labels_op.register_fake
def _(labels, ignore_index, vocab_size):
    return torch.empty_like(labels)


@torch.library.custom_op(f"{NAMESPACE}::logits_logps", mutates_args=())
def _forward_op(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return _forward(logits, labels, scale, softcap, temperature, backend)


@_forward_op.register_fake
def _(logits, labels, scale, softcap, temperature, backend):
    dtype = accumulate_dtype(logits.dtype)
    logps = logits.new_empty(labels.shape, dtype=dtype)
    return logps, logits.new_empty(labels.numel(), 2, dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::logits_logps_backward", mutates_args=())
def _backward_op(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    backend: str | None,
) -> Tensor:
    return _backward(grad_logps, logits, labels, lse, scale, softcap, temperature, backend)


@_backward_op.register_fake
def _(grad_logps, logits, labels, lse, scale, softcap, temperature, backend):
    return logits.new_empty(logits.shape)
