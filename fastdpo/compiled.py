"""The schedule as opaque operators, so that torch.compile(fullgraph=True) traces through a loss.

Which rows carry loss is known only when the labels are, so a tracer cannot follow the selection of
rows nor the loops over blocks. Under torch.compile one operator finds the rows, and the whole of
`fastdpo.linear` is one forward and one backward, with outputs whose shapes depend on the inputs'
shapes alone: the rows that carry loss are the first N of M, and E is packed into a flat workspace.
The first one waits for the number of rows, on behalf of policy, reference and backward; it checks
the labels as well, and raises the same ValueError when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo import checks, linear, workspace
from fastdpo.backends.torch import accumulate_dtype
from fastdpo.head import Head
from fastdpo.linear import Kept, Needs, Plan, RowState, TokenLogps
from fastdpo.parallel import vocabulary
from fastdpo.rows import Rows

_STATE = 3  # tensors in a RowState


@dataclass(frozen=True)
class DeferredRows:
    """Labels whose rows are selected when the operators run; until then every row is there."""

    labels: Tensor  # [M]
    index: Tensor  # [M] or [N], the positions that carry loss come first
    count: Tensor  # [] int64 on the CPU: how many these are

    @classmethod
    def find(
        cls,
        labels: Tensor,  # [M]
        ignore_index: int,
        vocab_size: int,
        row_index: Tensor | None,  # [N]
    ) -> DeferredRows:
        index, count = torch.ops.fastdpo.rows(labels, ignore_index, vocab_size, row_index)
        return cls(labels, index, count)

    def gather(self, values: Tensor) -> Tensor:  # [M, ...] -> [M, ...]
        return values

    scatter = gather


def token_logps(
    hidden: Tensor,  # [M, D]
    head: Head,
    rows: DeferredRows,
    plan: Plan,
) -> TokenLogps:  # [M] each, zeros where a row carries no loss
    """`linear.token_logps` as an operator, over all M positions."""
    grad = torch.is_grad_enabled()
    trained = [grad and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)]
    logps, entropy, others, *_ = torch.ops.fastdpo.token_logps(
        hidden,
        head.weight,
        head.bias,
        rows.labels,
        rows.index,
        rows.count,
        head.scale,
        head.softcap,
        head.temperature,
        ",".join(plan.stats),
        plan.workspace_bytes,
        plan.backend,
        plan.compute_dtype,
        None if plan.vocab_parallel is None else plan.vocab_parallel.name,
        *trained,
    )
    fields = {name: others[i] for i, name in enumerate(_without_entropy(plan.stats))}
    if "is_top1" in fields:
        fields["is_top1"] = fields["is_top1"] > 0
    if "entropy" in plan.stats:
        fields["entropy"] = entropy
    return TokenLogps(logps, **fields)


@torch.library.custom_op("fastdpo::rows", mutates_args=())
def _rows(
    labels: Tensor, ignore_index: int, vocab_size: int, row_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(index, count) of `DeferredRows`."""
    found = checks.label_rows(labels, ignore_index, vocab_size, row_index)
    count = torch.tensor(found.labels.shape[0])
    if row_index is not None:
        return row_index.clone(), count
    index = torch.zeros_like(labels)
    if found.index is not None:
        index[: found.index.shape[0]] = found.index
    return index, count


@_rows.register_fake
def _(labels, ignore_index, vocab_size, row_index):
    index = torch.empty_like(labels if row_index is None else row_index)
    return index, torch.empty((), dtype=torch.int64, device="cpu")


def _selected(labels: Tensor, index: Tensor, count: Tensor) -> Rows:
    n, total = int(count), labels.shape[0]
    if n == total:
        return Rows(labels, None, total)
    index = index[:n]
    return Rows(labels.index_select(0, index), index, total)


@torch.library.custom_op("fastdpo::token_logps", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    stats: str,
    workspace_bytes: int | None,
    backend: str | None,
    compute_dtype: torch.dtype | None,
    vocab_parallel: str | None,
    train_hidden: bool,
    train_weight: bool,
    train_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps [M], entropy [M] or [0], other stats [K, M], state [3, M], U [M, D] or [0], E
    flat).
    """
    head = Head(weight, bias, scale, softcap, temperature)
    plan = Plan(_names(stats), workspace_bytes, backend, compute_dtype, vocabulary(vocab_parallel))
    rows = _selected(labels, index, count)
    needs = Needs(train_hidden, train_weight, train_bias)
    outputs = _empty_outputs(hidden, weight, labels, plan, needs)
    logps, entropy, others, state, product, flat = outputs
    with linear.without_autocast(hidden):
        x, cast = linear.operands(hidden, head, rows, plan)
        storage = flat if flat.numel() else None
        done = linear.forward_pass(x, cast, rows.labels, plan, needs, storage)
    logps.copy_(rows.scatter(done.logps))
    for row, name in zip(others, _without_entropy(plan.stats), strict=True):
        row.copy_(rows.scatter(done.stats[name]))
    if "entropy" in plan.stats:
        entropy.copy_(rows.scatter(done.stats["entropy"]))
    n = x.shape[0]
    for row, value in zip(state, done.row_state, strict=True):
        row[:n] = value
    if done.hidden_product is not None:
        product[:n] = done.hidden_product
    return outputs


@_forward.register_fake
def _(
    hidden,
    weight,
    bias,
    labels,
    index,
    count,
    scale,
    softcap,
    temperature,
    stats,
    workspace_bytes,
    backend,
    compute_dtype,
    vocab_parallel,
    *trained,
):
    plan = Plan(_names(stats), workspace_bytes, backend, compute_dtype)
    return _empty_outputs(hidden, weight, labels, plan, Needs(*trained))


@torch.library.custom_op("fastdpo::token_logps_backward", mutates_args=())
def _backward(
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    state: Tensor,
    product: Tensor,
    flat: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    workspace_bytes: int | None,
    backend: str | None,
    compute_dtype: torch.dtype | None,
    vocab_parallel: str | None,
    train_hidden: bool,
    train_weight: bool,
    train_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; [0] for those that are not trained.

    A compiled graph passes zeros for the entropy's gradient where none flows. Anything else is
    refused: by an exception on a CPU, by a device-side assertion (which waits for nothing)
        elsewhere.
    """
    if grad_entropy is not None:
        if not grad_entropy.is_cpu:
            torch._assert_async(~grad_entropy.any(), linear.NO_STATISTICS_GRADIENT)
        elif bool(grad_entropy.any()):
            raise RuntimeError(linear.NO_STATISTICS_GRADIENT)
    head = Head(weight, bias, scale, softcap, temperature)
    plan = Plan((), workspace_bytes, backend, compute_dtype, vocabulary(vocab_parallel))
    rows = _selected(labels, index, count)
    needs = Needs(train_hidden, train_weight, train_bias)
    n = rows.labels.shape[0]
    kept = None
    if flat.numel():
        columns = workspace.columns_kept(n, head.vocab_size, flat, workspace_bytes)
        # A compiled backward may run again on the same workspace: it must not be spent.
        kept = Kept(flat, n, columns) if columns else None
    grad_rows = rows.gather(grad_logps)
    with linear.without_autocast(hidden):
        if product.numel():
            product = product[:n]
            grads: tuple[Tensor | None, ...] = (
                linear.frozen_head_backward(grad_rows, product, rows, plan, hidden.dtype),
                None,
                None,
            )
        else:
            state_rows = RowState(*(row[:n] for row in state))
            grads = linear.backward_pass(
                grad_rows, hidden, head, rows, plan, needs, state_rows, kept
            )
    x, w, b = (hidden.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return x, w, b


@_backward.register_fake
def _(grad_logps, grad_entropy, state, product, flat, hidden, weight, bias, *rest):
    trained = rest[-3:]
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if flag else hidden.new_empty(0)
        for t, flag in zip((hidden, weight, bias), trained, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, scale, softcap, temperature, _, workspace, backend, dtype, name = inputs[:-3]
    _, _, others, state, product, flat = output
    ctx.save_for_backward(state, product, flat, *tensors)
    options = (scale, softcap, temperature, workspace, backend, dtype, name)
    ctx.options = (*options, *inputs[-3:])
    ctx.trained = inputs[-3:]
    ctx.mark_non_differentiable(others, state, product, flat)
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx, grad_logps, grad_entropy, *_):
    none = (None,) * 14
    if grad_entropy is not None and grad_entropy.numel() == 0:
        grad_entropy = None
    if grad_logps is None:
        if grad_entropy is not None:
            raise RuntimeError(linear.NO_STATISTICS_GRADIENT)
        return None, None, None, *none
    grads = torch.ops.fastdpo.token_logps_backward(
        grad_logps, grad_entropy, *ctx.saved_tensors, *ctx.options
    )
    return *(g if flag else None for g, flag in zip(grads, ctx.trained, strict=True)), *none


torch.library.register_autograd(
    "fastdpo::token_logps", _backward_of_forward, setup_context=_setup_context
)


def _empty_outputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, plan: Plan, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward's outputs, of shapes that depend on shapes alone."""
    total, dtype = labels.shape[0], plan.compute_dtype or hidden.dtype
    wide = accumulate_dtype(dtype)
    early = dtype != torch.float16
    product = (total, hidden.shape[1]) if early and needs.hidden and not needs.head else (0,)
    flat = workspace.workspace_elements(total, weight.shape[0], hidden, dtype, plan.workspace_bytes)
    return (
        hidden.new_empty(total, dtype=wide),
        hidden.new_empty(total if "entropy" in plan.stats else 0, dtype=wide),
        hidden.new_empty(len(_without_entropy(plan.stats)), total, dtype=wide),
        hidden.new_zeros(_STATE, total, dtype=wide),
        hidden.new_empty(product, dtype=dtype),
        hidden.new_empty(flat if early and needs.head else 0, dtype=dtype),
    )


def _names(stats: str) -> tuple[str, ...]:
    return tuple(stats.split(",")) if stats else ()


def _without_entropy(stats: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics that carry no gradient whatever is asked."""
    return tuple(name for name in stats if name != "entropy")
