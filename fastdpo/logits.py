"""Materialized logits to label log-probabilities: the drop-in for code that already has them.

    logp_t = z_t[y_t] − lse_t          ∂loss/∂z_tv = g_t · (1[v = y_t] − exp(z_tv − lse_t))

The forward reads the logits once and keeps two numbers a row; the backward reads them once and writes the gradient
once. Where nothing else can ever see the logits again, the gradient is written over them: that is so
when the graph is not retained and this node holds the only reference to their storage.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.backends import select
from fastdpo.head import Head

# The saved logits and their handle in `backward` are two references to the storage; a third is somebody else's.
_OWN_REFERENCES = 2


def token_logps(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...], negative where a row carries no loss
    head: Head,  # its scale, softcap and temperature
    backend: str | None = None,
) -> Tensor:  # [...]
    """Label log-probabilities in the accumulate dtype, exactly 0 where a row carries no loss."""
    return _LogitsLogps.apply(logits, labels, head, backend)


class _LogitsLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, head: Head, backend: str | None) -> Tensor:
        module = select.primitive("logits_logps", logits, backend)
        # Flattened here and not by the caller: a view made outside would hold the storage, and forbid
        # the backward to write over it.
        logps, lse = module.logits_logps(_rows(logits), labels.flatten(), head)
        ctx.save_for_backward(logits, labels, lse)
        ctx.head, ctx.backend = head, backend
        return logps.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor):
        logits, labels, lse = ctx.saved_tensors
        in_place = logits.is_contiguous() and _unshared(logits)
        out = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        module = select.primitive("logits_logps_backward", logits, ctx.backend)
        module.logits_logps_backward(
            grad_logps.to(lse.dtype).flatten(), _rows(logits), labels.flatten(), lse, ctx.head, _rows(out)
        )
        return out, None, None, None


def _rows(logits: Tensor) -> Tensor:  # [..., V] -> [M, V]
    return logits.reshape(-1, logits.shape[-1])


def _unshared(logits: Tensor) -> bool:
    """Whether overwriting the logits can be seen by nobody: not by a second backward, not by another holder."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    use_count = getattr(torch._C, "_storage_Use_Count", None)
    if keeps_graph is None or use_count is None or keeps_graph():
        return False
    return use_count(logits.untyped_storage()._cdata) <= _OWN_REFERENCES
