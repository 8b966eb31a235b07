"""hidden states and a head to label log-probabilities: the schedule and its gradient.

For a row with label y, label logit a = z_y, anchor α, δ = α − a and S = Σ_{v ≠ y} exp(z_v − α)
(what `exp_logits` returns), with E_v = exp(z_v − α) · d_v for v ≠ y and E_y = −S · d_y:

    (1)  logp            = −log(1 + e^δ S)
    (2)  r               = 1 / (e^−δ + S)                          softmax_v = r · exp(z_v − α)
    (3)  ∂logp/∂z_v · d_v = −r E_v                                  for every v, the label included
    (4)  ∂loss/∂hidden   = −gain · diag(g r) · E · weight           g = ∂loss/∂logp
    (5)  ∂loss/∂weight   = −gain · Eᵀ · diag(g r) · hidden
    (6)  ∂loss/∂bias     = −gain · Eᵀ · (g r)

Where the entropy H = −Σ p log p enters the loss too, with h = ∂loss/∂H, p_v = r E_v / d_v:

    (7)  ∂loss/∂z_v = g [v = y] − p_v c_v          c_v = g + h (log p_v + H)

so that E_v c_v stands in (4) to (6) for g E_v, and (−g S + h e^−δ (logp + H)) d_y for the label.

where d is the softcap's derivative and gain = scale / temperature (`backends.contract.LogitMap`).
The row scale of (4) commutes with the product, so with a frozen head the forward already forms
U = −gain · diag(r) · E · weight, block by block of rows, and the backward is g · U: two products in
all. With a trainable head (5) needs g before its product: E is kept for as many columns of the
vocabulary as `workspace_bytes` holds (three products), and the other columns are computed again in
the backward (four). Columns and not rows are kept because each column of the weight's gradient is
then one complete product: nothing of the weight's size is ever summed in 16 bits, and no fp32 copy
of it is needed.

16-bit E is kept as bf16 for bf16 inputs. fp16 has too little range for an anchor that is fixed
before the sum is known, so with fp16 inputs E is always computed again in the backward, from the
anchor that makes S = 2^10.

Columns of the weight that are kept apart (`Head.extra`: LoRA's B [V, r], with p = s · drop(h) · Aᵀ
in the last r columns of hidden) are operands like the others, and have a gradient of their own,

    (8)  ∂loss/∂B        = −gain · Eᵀ · diag(g r) · p

r columns of (5). Beside a frozen weight that is all of (5): two products and 3 r / D of one, where
E is kept, and nothing of the weight's size. Where it is not, one product more computes it again.
Only backends that cannot read two weights have them joined, for the length of a forward, and by
blocks of columns in the backward.

The blocks of the forward depend on shapes and dtype alone, never on what is trained or kept: the
policy and a reference with equal weights go through the same operations and agree to the bit.

Where several processes share the vocabulary (`fastdpo.parallel`), `head` is this process's part of
it, labels of other parts lie outside [0, V), and a, α and S are the whole vocabulary's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import select
from ..backends.contract import ExpSums, Head, accumulate_dtype
from ..backends.workspace import (
    cleared,
    columns_kept,
    padded_empty,
    padded_storage,
    padded_view,
    recompute_columns,
    row_block,
    sum_rows,
)
from .call import Call
from .entropy import with_entropy
from .products import (
    add_widened,
    column_sums,
    lowered,
    multiply,
    multiply_into,
    multiply_wide,
    widened,
    widens,
)
from .row_state import RowState, label_entry_of, logps_of, renormalized, set_label_entries
from .rows import Rows
from .statistics import statistic, tolerance_of

# Products of fewer rows are summed in another order (seen with MKL): they join the block before
# them, so that equal rows have equal bits.
_FEW_ROWS = 16
# Of a row of tiny g whose label is far below, g r leaves the range of fp32 while g r E does not:
# E ≤ e^60 = 2^86.6. Half of that is multiplied into g r, and taken out of the products: exact, so
# that nothing else moves.
_LIFT = 2.0**43
_LIFT_BELOW = 2.0**-90


class Upstream(NamedTuple):
    """∂loss/∂ of what the forward returned, [N] each."""

    logps: Tensor  # g
    entropy: Tensor | None = None  # h; None where the entropy does not enter the loss
    value: Tensor | None = None  # H, with h

    def to(self, dtype: torch.dtype) -> Upstream:
        return Upstream(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]

    @property
    def size(self) -> Tensor:
        """What is taken out of each row of (7), and into the diagonal of (4) to (6)."""
        if self.entropy is None:
            return self.logps
        return torch.maximum(self.logps.abs(), self.entropy.abs())


class Needs(NamedTuple):
    """Which gradients will be asked for."""

    hidden: bool
    weight: bool
    bias: bool
    extra: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.head

    @property
    def head(self) -> bool:
        return self.weight or self.bias or self.extra


@dataclass(frozen=True)
class Kept:
    """E for the first columns of the vocabulary, rows padded."""

    flat: Tensor  # [at least N · K, padded]
    rows: int  # N
    columns: int  # K
    spendable: bool = False  # may the backward use it as scratch?

    @property
    def buffer(self) -> Tensor:  # [N, K]
        return padded_view(self.flat, self.rows, self.columns)


class ForwardPass(NamedTuple):
    logps: Tensor  # [N]
    stats: dict[str, Tensor]  # [N] each
    row_state: RowState
    kept: Kept | None
    hidden_product: Tensor | None  # U [N, D]


def forward_pass(
    x: Tensor,  # [N, D] rows that carry loss, in the compute dtype
    head: Head,
    labels: Tensor,  # [N]
    call: Call,
    needs: Needs,
    storage: Tensor | None = None,  # flat, for E; allocated where None
) -> ForwardPass:
    n, vocab, shared = x.shape[0], head.vocab_size, call.vocab_parallel
    whole_labels, labels = labels, call.local(labels)
    ready = x.dtype != torch.float16  # may E be formed before the sums are known?
    backend = select.primitive("exp_logits", x, call.backend)
    served = _served(backend, head)
    target = _target_logits(x, served, labels, call)
    blocks = _row_blocks(x, head, call)

    kept = product = scratch = stored = None
    if ready and needs.head:
        columns = columns_kept(n, vocab, x, call.workspace_bytes)
        if columns:
            kept = Kept(padded_storage(n, columns, x) if storage is None else storage, n, columns)
            stored = cleared(kept.buffer)
    elif ready and needs.hidden:
        product = torch.empty_like(x)
        scratch = padded_empty(max((b.stop - b.start for b in blocks), default=0), vocab, x)

    asked = tuple(s for s in call.stats if s != "mean_logits" or head.softcap is not None)
    tolerance = tolerance_of(x, head, labels, target, call) if "is_top1" in asked else None
    parts: list[ExpSums] = []
    reanchored: list[Tensor] = []
    for rows in blocks:
        out = None
        if stored is not None:
            out = stored[rows]
        elif scratch is not None:
            out = scratch[: rows.stop - rows.start]
        sums = backend.exp_logits(
            x[rows],
            served,
            labels[rows],
            target[rows],
            out=out,
            stats=asked,
            tolerance=None if tolerance is None else tolerance[rows],
        )
        reanchored.append(sums.anchor != target[rows])
        if shared is not None:
            sums, share = shared.joined(sums)
            if out is not None:
                _scale_rows(out, share)
        parts.append(sums)
        if out is not None:
            state = RowState(target[rows], sums.anchor, sums.sum, reanchored[-1])
            set_label_entries(out, labels[rows], label_entry_of(state, head))
            if product is not None:
                scale = (-head.gain * state.inverse).unsqueeze(1)
                for into, weight in head.parts(product[rows]):
                    into.copy_(multiply(out, weight) * scale)
    sums = _joined(parts, target)
    flags = torch.cat(reanchored) if reanchored else target.new_empty(0, dtype=torch.bool)
    state = RowState(target, sums.anchor, sums.sum, flags)
    logps = logps_of(state)
    stats = {
        name: statistic(name, x, whole_labels, head, state, sums, logps, call)
        for name in call.stats
    }
    return ForwardPass(logps, stats, state, kept, product)


def frozen_head_backward(
    grad_logps: Tensor,  # [N]
    product: Tensor,  # U [N, D]
    rows: Rows,
    call: Call,
    dtype: torch.dtype,  # of hidden
) -> Tensor:
    """The gradient of hidden [M, D]: g · U."""
    scaled = product * grad_logps.to(accumulate_dtype(product.dtype)).unsqueeze(1)
    return rows.scatter(_reduced(scaled, call).to(dtype))


def backward_pass(
    upstream: Upstream,
    hidden: Tensor,  # [M, D]
    head: Head,
    rows: Rows,
    call: Call,
    needs: Needs,
    state: RowState,
    kept: Kept | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden [M, D], weight [V, D], bias [V] and extra [V, r], None where not
    needed.
    """
    upstream = upstream.to(state.target.dtype)
    x, cast = operands(hidden, head, rows, call)
    if x.dtype == torch.float16:
        state = renormalized(state)
    coefficients, lift = _coefficients(upstream.size, head, state, x)  # [N], the diag of (4) to (6)
    # fp16 has no room for small coefficients: take their size out of the product, and put it back
    # in fp32.
    size = None
    if x.dtype == torch.float16 and len(x):
        size = coefficients.abs().amax().clamp_min(torch.finfo(coefficients.dtype).tiny)
    small = coefficients if size is None else coefficients / size
    grads = [torch.empty_like(head.weight) if needs.weight else None]
    if head.extra is not None:
        grads.append(torch.empty_like(head.extra) if needs.extra else None)
    factors = [
        (grad, (part * small.unsqueeze(1)).to(x.dtype))  # [N, D] or [N, r]
        for grad, (part, _) in zip(grads, head.parts(x), strict=True)
        if grad is not None
    ]
    grad_bias = torch.empty_like(head.bias) if needs.bias and head.bias is not None else None
    grad_x = _HiddenGradient(x, coefficients, lift)
    grad_rows: Tensor | None = None
    factor: Tensor | None

    labels = call.local(rows.labels)
    blocks = _column_blocks(x, cast, labels, call, state, kept)
    if upstream.entropy is not None:
        blocks = with_entropy(blocks, upstream, x, cast, labels, state, kept)
    for start, stop, e in blocks:
        for grad, factor in factors:
            _weight_gradient(grad[start:stop], e, factor, lift, size)
        if grad_bias is not None:
            grad_bias[start:stop] = lowered(column_sums(e, coefficients), lift)
        if needs.hidden and stop - start == call.vocab_size(head):
            grad_rows = grad_x.whole(e, cast)
        elif needs.hidden:
            grad_x.add(e, cast.columns(start, stop))
    e = factor = None  # their memory is needed no more
    factors.clear()
    if needs.hidden:
        grad_rows = _reduced(grad_x.finish(), call) if grad_rows is None else grad_rows
        grad_rows = rows.scatter(grad_rows.to(hidden.dtype))
    return grad_rows, grads[0], grad_bias, grads[1] if len(grads) > 1 else None


def _weight_gradient(
    into: Tensor,  # [C, D]
    e: Tensor,  # [N, C]
    scaled: Tensor,  # [N, D]
    lift: float,
    size: Tensor | None,  # [] taken out of the product, for fp16
) -> None:
    wide = widened(e) or (widens(e) and into.dtype == torch.float32)
    if size is None and (wide or into.dtype == e.dtype):
        multiply_into(into, e.t(), scaled, lift)
    else:
        product = multiply(e.t(), scaled)
        into.copy_(lowered(product, lift) if size is None else product * size)


def _coefficients(
    size: Tensor,  # [N]
    head: Head,
    state: RowState,
    x: Tensor,
) -> tuple[Tensor, float]:
    """(lift · −gain g r [N], lift), g as `Upstream.size`.

    Only a CPU can look whether a lift is needed. Elsewhere it costs nothing in the products, whose
    factor is applied to their sums; a CPU's may be applied to an operand.
    """
    inverse = state.inverse
    found = -head.gain * size * inverse
    # fp64 has room, and fp16 rows are anchored so that r has.
    if x.dtype not in (torch.float32, torch.bfloat16):
        return found, 1.0
    if x.is_cpu and not bool(((found.abs() < _LIFT_BELOW) & (size != 0)).any()):
        return found, 1.0
    return (-head.gain * _LIFT) * size * inverse, _LIFT


def _row_blocks(x: Tensor, head: Head, call: Call) -> list[slice]:
    """The rows, a block at a time. Every process makes as many blocks: they talk in each."""
    n, shared = x.shape[0], call.vocab_parallel
    block = row_block(head.vocab_size if shared is None else shared.largest, x)
    ends = list(range(block, n - _FEW_ROWS + 1, block)) + [n] * (n > 0)
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _column_blocks(x, head, labels, call, state, kept):
    """(start, stop, E[:, start:stop]) over the vocabulary: what was kept, then the rest computed
    again.
    """
    vocab, done = head.vocab_size, 0
    buffer = None
    if kept is not None:
        done, buffer = kept.columns, kept.buffer
        yield 0, done, buffer
    if done == vocab:
        return
    if buffer is None or not kept.spendable:
        buffer = padded_empty(len(x), recompute_columns(len(x), vocab, x), x)
    backend = select.primitive("exp_logits", x, call.backend)
    entry, reanchored = label_entry_of(state, head), state.reanchored
    for start in range(done, vocab, buffer.shape[1]):
        stop = min(start + buffer.shape[1], vocab)
        e = buffer[:, : stop - start]
        part = _served(backend, head.columns(start, stop))
        # In the forward's blocks and by its operations: the order in which a product sums may
        # depend on its shape, and E would not be what S is the sum of.
        for rows in _row_blocks(x, head, call):
            backend.exp_logits(
                x[rows],
                part,
                labels[rows] - start,
                state.anchor[rows],
                fixed_anchor=True,
                reanchored=reanchored[rows],
                out=e[rows],
                label_entry=entry[rows],
            )
        yield start, stop, e


class _HiddenGradient:
    """diag(coefficients) / lift · Σ E · weight over blocks of columns, summed in the accumulate
    dtype.
    """

    def __init__(self, x: Tensor, coefficients: Tensor, lift: float):
        self._x, self._coefficients, self._lift = x, coefficients.unsqueeze(1), lift
        self._sum: Tensor | None = None  # [N, D]

    def whole(self, e: Tensor, head: Head) -> Tensor:
        """The gradient [N, D] from all columns at once: no sum remains, and no fp32 copy of it but
        where operands are widened.
        """
        if widened(e):
            self.add(e, head)
            return self.finish()
        if not widens(e):
            found = [multiply(e, weight).mul_(self._coefficients) for weight in head.weights]
            return lowered(found[0] if len(found) == 1 else torch.cat(found, 1), self._lift)
        value, block = torch.empty_like(self._x), row_block(head.vocab_size, self._x)
        for start in range(0, e.shape[0], block):
            rows = slice(start, start + block)
            for into, weight in head.parts(value[rows]):
                product = multiply(e[rows], weight).mul_(self._coefficients[rows])
                into.copy_(lowered(product, self._lift))
        return value

    def add(self, e: Tensor, head: Head) -> None:
        if self._sum is None:
            self._sum = self._x.new_zeros(self._x.shape, dtype=self._coefficients.dtype)
        for into, weight in head.parts(self._sum):
            self._add(into, e, weight)

    @staticmethod
    def _add(into: Tensor, e: Tensor, weight: Tensor) -> None:
        if e.dtype == into.dtype:
            into.addmm_(e, weight)
        elif widens(e):
            block = sum_rows(into)
            for total, rows in zip(into.split(block), e.split(block), strict=True):
                total += multiply_wide(rows, weight)
        else:
            add_widened(into, e, weight)

    def finish(self) -> Tensor:
        assert self._sum is not None
        return lowered(self._sum.mul_(self._coefficients), self._lift)


def _served(backend: Any, head: Head) -> Head:
    return head if backend.TAKES_EXTRA else head.joined()


def _target_logits(x: Tensor, head: Head, labels: Tensor, call: Call) -> Tensor:  # [N]
    backend = select.primitive("target_logits", x, call.backend)
    head = _served(backend, head)
    if call.vocab_parallel is None:
        return backend.target_logits(x, head, labels)
    inside = labels.clamp(0, head.vocab_size - 1)
    return call.vocab_parallel.from_owner(backend.target_logits(x, head, inside), labels)


def _scale_rows(e: Tensor, share: Tensor) -> None:  # [N, K], [N]
    """E from this process's anchors to the common ones, which differ for far rows alone: on a GPU,
    where nobody may look whether there is one, a read and a write of E (3 % of three products at
    D = 4096).
    """
    if e.is_cpu and bool((share == 1).all()):
        return
    e.mul_(share.unsqueeze(1))


def _reduced(grad_rows: Tensor, call: Call) -> Tensor:  # [N, D]
    shared = call.vocab_parallel
    return grad_rows if shared is None else shared.hidden_grad(grad_rows)


def operands(hidden: Tensor, head: Head, rows: Rows, call: Call) -> tuple[Tensor, Head]:
    """The rows that carry loss and the head, in the compute dtype, contiguous."""
    x = rows.gather(hidden)
    dtype = call.compute_dtype
    if dtype is None:
        return x.contiguous(), head
    bias, extra = (None if t is None else t.to(dtype) for t in (head.bias, head.extra))
    return x.to(dtype).contiguous(), dataclasses.replace(
        head, weight=head.weight.to(dtype), bias=bias, extra=extra
    )


def without_autocast(x: Tensor) -> torch.autocast:
    """The dtypes here are chosen already (`Call.compute_dtype`): autocast must not choose again."""
    return torch.autocast(x.device.type, enabled=False)


def _joined(parts: list[ExpSums], like: Tensor) -> ExpSums:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = like.new_empty(0)
        return ExpSums(*(empty for _ in ExpSums._fields))
    anchors, totals, *stats = zip(*parts, strict=True)
    joined = (None if s[0] is None else torch.cat(s) for s in stats)
    return ExpSums(torch.cat(anchors), torch.cat(totals), *joined)
