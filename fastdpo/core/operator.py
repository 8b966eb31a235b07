"""hidden states and a head to label log-probabilities: the one autograd.Function over the schedule.

Eager, it runs the schedule (`linear`) on the N rows that carry loss, in the open: counters of
operations see every product. While a tracer records, the rows are deferred (`rows`) and two opaque
operators stand for the forward and the backward: their outputs have shapes that follow from the
inputs' shapes, so what belongs to rows has M of them, of which the first N are meant, and E is
packed into a flat workspace. The first operator to run has waited for the number of rows already,
on behalf of policy, reference and backward (`fastdpo::rows`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import workspace
from ..backends.contract import Head, accumulate_dtype
from ..names import NAMESPACE, ops
from . import linear
from .autograd import differentiable_once, graph_is_kept
from .call import Call
from .linear import ForwardPass, Kept, Needs, Upstream
from .results import LinearLogps
from .row_state import RowState
from .rows import Rows, selected


def token_logps(
    hidden: Tensor,  # [M, D]
    head: Head,
    rows: Rows,
    call: Call,
) -> LinearLogps:  # [N] each ([M] while deferred, zeros where a row carries no loss)
    """Label log-probabilities of the rows that carry loss, differentiable in hidden and the head's
    tensors.
    """
    grad = torch.is_grad_enabled()
    inputs = (hidden, head.weight, head.bias, head.extra)
    needs = Needs(*(grad and t is not None and t.requires_grad for t in inputs))
    logps, *stats = _TokenLogps.apply(*inputs, head, rows, call, needs)
    return LinearLogps(logps, **dict(zip(call.stats, stats, strict=True)))


class _Saved(NamedTuple):
    """What the forward leaves to the backward, beside its inputs."""

    state: Tensor | None  # [3, N] a packed RowState; None where no gradient will be asked for
    product: Tensor | None  # U [N, D], with a frozen head
    flat: Tensor | None  # E of the first columns, for `Kept`
    entropy: Tensor | None = None  # [N] H, where it was asked for


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, extra, head: Head, rows: Rows, call: Call, needs: Needs):
        ctx.set_materialize_grads(False)
        head = dataclasses.replace(head, weight=weight, bias=bias, extra=extra)
        if rows.count is not None:
            logps, stats, saved = _forward_by_operator(hidden, head, rows, call, needs)
            columns = 0
        else:
            done = _forward_pass(hidden, head, rows, call, needs)
            logps, stats = done.logps, tuple(done.stats[name] for name in call.stats)
            flat = None if done.kept is None else done.kept.flat
            state = done.row_state.packed() if needs.any else None
            entropy = done.stats.get("entropy") if needs.any else None
            saved = _Saved(state, done.hidden_product, flat, entropy)
            columns = 0 if done.kept is None else done.kept.columns
        if needs.any:
            inputs = (hidden, weight, bias, extra)
            if saved.product is not None and rows.count is None and saved.entropy is None:
                inputs = (None,) * 4  # U is all that an eager backward reads
            # All of it as saved tensors, E as well: freed when the backward is done, and seen by
            # checkpointing and offloading.
            ctx.save_for_backward(*inputs, rows.labels, rows.index, rows.count, *saved)
            ctx.columns, ctx.call, ctx.needs = columns, call, needs
            ctx.shape, ctx.vocab_size = rows.shape, rows.vocab_size
            ctx.curve, ctx.dtype = (head.scale, head.softcap, head.temperature), hidden.dtype
        ctx.mark_non_differentiable(
            *(s for name, s in zip(call.stats, stats, strict=True) if name != "entropy")
        )
        return logps, *stats

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_logps, *grad_stats):
        hidden, weight, bias, extra, labels, index, count, *rest = ctx.saved_tensors
        saved = _Saved(*rest)
        grad_entropy = next((grad for grad in grad_stats if grad is not None), None)
        if grad_logps is None and grad_entropy is None:
            return (None,) * 8
        if grad_logps is None:
            assert grad_entropy is not None
            grad_logps = torch.zeros_like(grad_entropy)
        scale, softcap, temperature = ctx.curve
        # No tensors where U is all that is read.
        head = Head(weight, bias, scale, softcap, temperature, extra)
        upstream = Upstream(grad_logps)
        if grad_entropy is not None:
            upstream = Upstream(grad_logps, grad_entropy, saved.entropy)
        rows = Rows(labels, index, ctx.shape, ctx.vocab_size, None, count)
        if count is not None:
            grads = _backward_by_operator(upstream, hidden, head, rows, ctx.call, ctx.needs, saved)
            return *grads, *(None,) * 4
        kept = None
        if saved.flat is not None:
            # Its memory is scratch afterwards, unless the graph will be gone through again.
            kept = Kept(saved.flat, len(labels), ctx.columns, spendable=not graph_is_kept())
        with linear.without_autocast(grad_logps):
            if saved.product is not None and grad_entropy is None:
                grad = linear.frozen_head_backward(
                    grad_logps, saved.product, rows, ctx.call, ctx.dtype
                )
                return grad, *(None,) * 7
            assert saved.state is not None
            state = RowState.unpacked(saved.state)
            grads = linear.backward_pass(
                upstream, hidden, head, rows, ctx.call, ctx.needs, state, kept
            )
        return *grads, *(None,) * 4


def _forward_pass(
    hidden: Tensor,  # [M, D]
    head: Head,
    rows: Rows,
    call: Call,
    needs: Needs,
    storage: Tensor | None = None,  # flat, for E
) -> ForwardPass:
    with linear.without_autocast(hidden):
        x, cast = linear.operands(hidden, head, rows, call)
        return linear.forward_pass(x, cast, rows.labels, call, needs, storage)


# ---- While a tracer records


def _forward_by_operator(
    hidden: Tensor, head: Head, rows: Rows, call: Call, needs: Needs
) -> tuple[Tensor, tuple[Tensor, ...], _Saved]:
    logps, others, entropy, state, product, flat = ops.token_logps(
        hidden,
        head.weight,
        head.bias,
        head.extra,
        rows.labels,
        rows.index,
        rows.count,
        *(head.scale, head.softcap, head.temperature),
        call.to_text(),
        list(needs),
    )
    found = {name: others[i] for i, name in enumerate(_without_entropy(call.stats))}
    found["entropy"] = entropy
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"] > 0
    stats = tuple(found[name] for name in call.stats)
    return logps, stats, _Saved(state, product, flat, found["entropy"])


def _backward_by_operator(
    upstream: Upstream,
    hidden: Tensor,
    head: Head,
    rows: Rows,
    call: Call,
    needs: Needs,
    saved: _Saved,
) -> tuple[Tensor | None, ...]:
    grads = ops.token_logps_backward(
        *upstream,
        *saved[:3],
        hidden,
        head.weight,
        head.bias,
        head.extra,
        rows.labels,
        rows.index,
        rows.count,
        *(head.scale, head.softcap, head.temperature),
        call.to_text(),
        list(needs),
    )
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


@torch.library.custom_op(f"{NAMESPACE}::token_logps", mutates_args=())
def _forward(  # many parameters: an operator takes no objects
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    extra: Tensor | None,
    labels: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    call_text: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps [M], other statistics [K, M], entropy [M] or [0], and the three of `_Saved`, [0] where
    there is none).
    """
    call, needs = Call.from_text(call_text), Needs(*needed)
    rows = selected(labels, index, count, weight.shape[0])
    outputs = _empty_outputs(hidden, weight, labels, call, needs)
    logps, others, entropy, state, product, flat = outputs
    head = Head(weight, bias, scale, softcap, temperature, extra)
    storage = flat if flat.numel() else None
    done = _forward_pass(hidden, head, rows, call, needs, storage)
    logps.copy_(rows.scatter(done.logps))
    for row, name in zip(others, _without_entropy(call.stats), strict=True):
        row.copy_(rows.scatter(done.stats[name]))
    if "entropy" in call.stats:
        entropy.copy_(rows.scatter(done.stats["entropy"]))
    n = rows.labels.shape[0]
    state[:, :n] = done.row_state.packed()
    if done.hidden_product is not None:
        product[:n] = done.hidden_product
    return outputs


@_forward.register_fake
def _(hidden, weight, bias, extra, labels, *rest):
    *_, call_text, needed = rest
    return _empty_outputs(hidden, weight, labels, Call.from_text(call_text), Needs(*needed))


@torch.library.custom_op(f"{NAMESPACE}::token_logps_backward", mutates_args=())
def _backward(  # many parameters: an operator takes no objects
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    state: Tensor,
    product: Tensor,
    flat: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    extra: Tensor | None,
    labels: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    call_text: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias and extra; [0] for those that are not needed.

    A compiled graph passes zeros for the entropy's gradient where none flows, which a CPU can see.
    """
    if grad_entropy is not None and grad_entropy.is_cpu and not bool(grad_entropy.any()):
        grad_entropy = entropy = None
    call, needs = Call.from_text(call_text), Needs(*needed)
    head = Head(weight, bias, scale, softcap, temperature, extra)
    rows = selected(labels, index, count, weight.shape[0])
    n = rows.labels.shape[0]
    given = (grad_logps, grad_entropy, entropy)
    upstream = Upstream(*(None if t is None else rows.gather(t) for t in given))  # type: ignore[arg-type]
    with linear.without_autocast(hidden):
        if product.numel() and grad_entropy is None:
            grad = linear.frozen_head_backward(
                upstream.logps, product[:n], rows, call, hidden.dtype
            )
            grads: tuple[Tensor | None, ...] = (grad, None, None, None)
        else:
            kept = None
            if flat.numel():
                columns = workspace.columns_kept(n, head.vocab_size, flat, call.workspace_bytes)
                # A compiled backward may run again on the same workspace: it must not be spent.
                kept = Kept(flat, n, columns) if columns else None
            part = RowState.unpacked(state[:, :n])
            grads = linear.backward_pass(upstream, hidden, head, rows, call, needs, part, kept)
    x, w, b, a = (hidden.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return x, w, b, a


@_backward.register_fake
def _(grad_logps, grad_entropy, entropy, state, product, flat, hidden, weight, bias, extra, *rest):
    needed = rest[-1]
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if flag else hidden.new_empty(0)
        for t, flag in zip((hidden, weight, bias, extra), needed, strict=True)
    )


def _empty_outputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, call: Call, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward's outputs, of shapes that depend on shapes alone."""
    total, dtype = labels.shape[0], call.compute_dtype or hidden.dtype
    wide = accumulate_dtype(dtype)
    early = dtype != torch.float16
    product = (total, hidden.shape[1]) if early and needs.hidden and not needs.head else (0,)
    flat = workspace.workspace_elements(total, weight.shape[0], hidden, dtype, call.workspace_bytes)
    return (
        hidden.new_empty(total, dtype=wide),
        hidden.new_empty(len(_without_entropy(call.stats)), total, dtype=wide),
        hidden.new_empty(total if "entropy" in call.stats else 0, dtype=wide),
        hidden.new_zeros(3, total, dtype=wide),  # a packed RowState
        hidden.new_empty(product, dtype=dtype),
        hidden.new_empty(flat if early and needs.head else 0, dtype=dtype),
    )


def _without_entropy(stats: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics that carry no gradient whatever is asked."""
    return tuple(name for name in stats if name != "entropy")
