"""Materialized logits to label log-probabilities: the drop-in for code that already has them.

    logp_t = z_t[y_t] − lse_t          ∂loss/∂z_tv = g_t · (1[v = y_t] − exp(z_tv − lse_t))

The forward reads the logits once and keeps two numbers a row, the two terms of lse_t; the backward
reads them once and writes the gradient once. Where nobody can ever see the logits again, the
gradient is written over them: that is so when the graph is not retained, and neither a Python name
nor another node of the graph nor a view holds them.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch
from torch import Tensor

from fastdpo.autograd import differentiable_once, graph_is_kept
from fastdpo.backends import select
from fastdpo.head import Head


def token_logps(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...], negative where a row carries no loss
    head: Head,  # its scale, softcap and temperature
    backend: str | None = None,
) -> Tensor:  # [...]
    """Label log-probabilities in the accumulate dtype, exactly 0 where a row carries no loss."""
    return _LogitsLogps.apply(logits, labels, head, backend)


def fused_loss(logits: Tensor, backend: str | None) -> ModuleType | None:
    """The backend that takes such logits to the DPO sigmoid loss in one launch sequence, if the one
    that serves them does.
    """
    module = select.primitive("logits_logps", logits, backend)
    return module if hasattr(module, "logits_sequence_loss") else None


def sigmoid_loss(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...], negative where a row carries no loss
    head: Head,
    offsets: Tensor,  # [2B + 1] over the M rows
    ref_logps: Tensor,  # [2B]
    *,
    beta: float,
    label_smoothing: float,
    average: bool,
    pairs: str,
    module: ModuleType,  # of `fused_loss`
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO sigmoid loss [], the sequences' log-probabilities [2B] and their rewards [2B]
    (detached).
    """
    options = (beta, label_smoothing, average, pairs)
    return _LogitsLoss.apply(logits, labels, head, offsets, ref_logps.detach(), options, module)


class _LogitsLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, head: Head, backend: str | None) -> Tensor:
        module = select.primitive("logits_logps", logits, backend)
        _alone()  # measured here once, outside of any backward
        # Flattened here and not by the caller: a view made outside would hold the storage, and
        # forbid the backward to write over it.
        logps, lse = module.logits_logps(_rows(logits), labels.flatten(), head)
        ctx.save_for_backward(logits, labels, lse)
        ctx.head, ctx.backend = head, backend
        return logps.view(labels.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_logps: Tensor):
        logits, labels, lse = ctx.saved_tensors
        in_place = logits.is_contiguous() and _unshared(_holders(logits))
        module = select.primitive("logits_logps_backward", logits, ctx.backend)
        grad = grad_logps.to(lse.dtype).flatten()
        return _gradient(module, grad, logits, labels, lse, ctx.head, in_place), None, None, None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, head: Head, offsets, ref_logps, options, module: ModuleType):
        ctx.set_materialize_grads(False)
        _alone()
        found = module.logits_sequence_loss(
            _rows(logits), labels.flatten(), head, offsets, ref_logps, *options
        )
        ctx.save_for_backward(logits, labels, found.lse)
        # What nobody writes over is kept beside: `_alone` has measured three saved tensors.
        ctx.rows, ctx.offsets, ctx.average = found.row_coefficients, offsets, options[2]
        ctx.head, ctx.module = head, module
        ctx.mark_non_differentiable(found.loss.rewards)
        return found.loss.loss, found.loss.logps, found.loss.rewards

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss: Tensor | None, grad_logps: Tensor | None, _grad_rewards):
        logits, labels, lse = ctx.saved_tensors
        in_place = logits.is_contiguous() and _unshared(_holders(logits))
        grad, scale = ctx.rows, grad_loss
        if grad_loss is None:
            grad = torch.zeros_like(grad)
        if grad_logps is not None:
            grad = grad if grad_loss is None else grad * grad_loss
            grad, scale = grad + _per_row(ctx, grad_logps, labels.flatten()), None
        grad = _gradient(ctx.module, grad, logits, labels, lse, ctx.head, in_place, scale)
        return grad, *(None,) * 6


def _per_row(ctx, grad_logps: Tensor, labels: Tensor) -> Tensor:  # [2B], [M] -> [M]
    """∂/∂ of the sequences' sums (or averages), for each of their rows."""
    lengths = ctx.offsets.diff()
    carries = (labels >= 0).to(grad_logps.dtype)
    if ctx.average:
        before = torch.nn.functional.pad(carries.cumsum(0), (1, 0))
        grad_logps = grad_logps / before[ctx.offsets].diff().clamp(min=1)
    return grad_logps.repeat_interleave(lengths, output_size=labels.numel()) * carries


def _gradient(
    module: ModuleType,
    grad: Tensor,  # [M]
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    lse: Tensor,  # [M, 2]
    head: Head,
    in_place: bool,
    scale: Tensor | None = None,  # [], where the module multiplies by one
) -> Tensor:  # [..., V]
    rows = _rows(logits)
    # `rows` itself and no second view of it: a backend tells by that.
    out = rows if in_place else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    options = {} if scale is None else {"grad_scale": scale}
    module.logits_logps_backward(grad, rows, labels.flatten(), lse, head, out, **options)
    return logits if in_place else out.view(logits.shape)


def _rows(logits: Tensor) -> Tensor:  # [..., V] -> [M, V]
    return logits.reshape(-1, logits.shape[-1])


def _unshared(holders: tuple[int, ...]) -> bool:
    """Whether overwriting the logits can be seen by nobody: not by a second backward, not by
    another holder.
    """
    if graph_is_kept():
        return False
    return holders == _alone()


def _holders(tensor: Tensor) -> tuple[int, ...]:
    """How many hold the storage, the tensor, and its Python object; () where PyTorch does not
    tell.
    """
    use_count = getattr(torch._C, "_storage_Use_Count", None)
    if use_count is None or not hasattr(tensor, "_use_count"):
        return ()
    return use_count(tensor.untyped_storage()._cdata), tensor._use_count(), sys.getrefcount(tensor)


@functools.cache
def _alone() -> tuple[int, ...] | None:
    """What `_holders` counts in a backward when nobody else holds the saved tensor.

    Measured and not assumed, as it depends on the versions of PyTorch and Python; None, which
    equals nothing, unless each way of holding on to the tensor is seen to change it.
    """
    seen: list[tuple[int, ...]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, z):
            ctx.save_for_backward(x, y, z)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            x, _y, _z = ctx.saved_tensors
            seen.append(_holders(x))
            return grad.expand(x.shape), None, None

    with torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True)
        one = torch.ones(1)
        made = leaf * 1.0
        loss = Probe.apply(made, one, one)
        del made
        loss.backward()
        for hold in (lambda t: t, lambda t: t.detach(), lambda t: t[:1], lambda t: (t * t).grad_fn):
            made = leaf * 1.0
            held = hold(made)
            loss = Probe.apply(made, one, one)
            del made
            loss.backward()
            del held
    alone, *others = seen
    return None if alone in others else alone
