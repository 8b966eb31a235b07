"""The primitives in chunked PyTorch: any device, deterministic, and the oracle of the other
backends.

It reads like the equations of `fastdpo.backends.contract`, one vocabulary tile at a time,
so that nothing of size [N, V] is ever written but what the caller asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import workspace
from .contract import (
    COLLISION_SHIFT,
    REANCHOR_ABOVE,
    ExpSums,
    Head,
    LogitMap,
    SequenceLoss,
    accumulate_dtype,
)

__all__ = [
    "exp_logits",
    "logits_logps",
    "logits_logps_backward",
    "sequence_loss",
    "target_logits",
]

# Elements of one tile of logits: 8 MiB in fp32 stays in a CPU's last-level cache, 128 MiB fills a
# GPU.
_TILE_ELEMENTS = {"cpu": 1 << 21}
_TILE_ELEMENTS_ELSEWHERE = 1 << 25
_MIN_TILE_COLUMNS = 512


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] · b [K, N] in the accumulate dtype, never rounded to 16 bits on the way."""
    if a.dtype == accumulate_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """z [N, V] in the accumulate dtype."""
    (x, weight), *extra = head.parts(hidden)
    z = matmul(x, weight.t())
    for x, weight in extra:
        z.addmm_(x.to(z.dtype), weight.t().to(z.dtype))
    if head.bias is not None:
        z += head.bias
    return _transform(z, head)


def _transform(u: Tensor, head: Head | LogitMap) -> Tensor:
    """softcap(scale · u) / temperature, in place."""
    if head.softcap is None:
        return u if head.gain == 1.0 else u.mul_(head.gain)
    u.mul_(head.scale / head.softcap).tanh_()
    return u.mul_(head.softcap / head.temperature)


def target_logits(
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
) -> Tensor:  # [N]
    return _entries_logits(hidden, head, labels)


def _entries_logits(
    hidden: Tensor,  # [M, D]
    head: Head,
    entries: Tensor,  # [N]
    rows: Tensor | None = None,  # [N] of hidden; None: each in turn
) -> Tensor:  # [N]
    dtype = accumulate_dtype(hidden.dtype)
    # Multiplied in the input's precision, summed in the accumulate dtype; rows by rows, to stay
    # small.
    block = max(1, _tile_elements(hidden) // max(1, hidden.shape[1]))
    a = hidden.new_empty(entries.shape[0], dtype=dtype)
    for start in range(0, entries.shape[0], block):
        part = slice(start, start + block)
        of_rows = hidden[part] if rows is None else hidden[rows[part]]
        sums = [
            weight.index_select(0, entries[part]).to(dtype).mul_(x).sum(-1)
            for x, weight in head.parts(of_rows)
        ]
        a[part] = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    if head.bias is not None:
        a += head.bias.index_select(0, entries)
    return _transform(a, head)


def exp_logits(  # many parameters: the contract's
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
    anchor: Tensor,  # [N]
    *,
    fixed_anchor: bool = False,
    reanchored: Tensor | None = None,  # [N] bool
    out: Tensor | None = None,  # [N, K]
    label_entry: Tensor | None = None,  # [N]
    stats: tuple[str, ...] = (),
    tolerance: Tensor | None = None,  # [N]
) -> ExpSums:
    close = None if tolerance is None else _Close(labels, anchor, tolerance)
    # Not a function of how many rows there are where rows are summed: a row's sum is to have the
    # same terms in a last, smaller block of rows. Where E alone is asked for (again, for a few
    # columns), tiles as large as the forward's.
    rows_at_a_time = len(hidden) if fixed_anchor else workspace.row_block(head.vocab_size, hidden)
    tiles = _tiles(head.vocab_size, rows_at_a_time, hidden)
    sums = _exp_sums(hidden, head, labels, anchor, tiles, out, label_entry, stats, close)
    if not fixed_anchor:
        reanchored = ~(sums.sum <= REANCHOR_ABOVE)  # NaN and inf are, too
    if reanchored is None or not bool(reanchored.any()):
        return sums
    # The label of these rows is so unlikely that e leaves the range of fp32: anchor them at their
    # maximum.
    rows = reanchored.nonzero().squeeze(1)
    hidden, labels, top = hidden[rows], labels[rows], anchor[rows]
    if not fixed_anchor:
        found = _exp_sums(hidden, head, labels, top, tiles, None, None, ("is_top1",))
        assert found.top is not None
        top = found.top
    part = None if out is None else out[rows]
    entry = None if label_entry is None else label_entry[rows]
    # Where nothing can occur the sums are 0, whatever the anchor, and not exp(−∞ + ∞).
    finite = torch.where(top == -torch.inf, 0.0, top)
    again = _exp_sums(hidden, head, labels, finite, tiles, part, entry, stats)
    again = again._replace(anchor=top)
    if out is not None and part is not None:
        out[rows] = part
    return ExpSums._make(
        None if old is None or new is None else old.index_copy(0, rows, new)
        for old, new in zip(sums, again, strict=True)
    )


def _exp_sums(  # many parameters: the contract's, and how they are cut
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
    anchor: Tensor,  # [N]
    tiles: list[tuple[int, int]],
    out: Tensor | None,  # [N, K]
    label_entry: Tensor | None,  # [N]
    stats: tuple[str, ...],
    close: _Close | None = None,
) -> ExpSums:
    n, stored = hidden.shape[0], 0 if out is None else out.shape[1]
    zeros = anchor.new_zeros
    total = zeros(n)
    entropy = zeros(n) if "entropy" in stats else None
    collision = zeros(n) if "log_sum_sq_probs" in stats else None
    logits = zeros(n) if "mean_logits" in stats else None
    top = torch.full_like(anchor, -torch.inf) if "is_top1" in stats else None
    for start, stop in tiles:
        z = logits_of(hidden, head.columns(start, stop))
        derivative = head.softcap_derivative(z) if start < stored else None
        inside = (labels >= start) & (labels < stop)
        column = (labels - start).clamp_(0, stop - start - 1).unsqueeze(1)
        own = z.gather(1, column).squeeze(1)
        if logits is not None:
            logits += z.sum(1) - torch.where(inside, own, 0.0)
        z.scatter_(1, column, torch.where(inside, -torch.inf, own).unsqueeze(1))
        if top is not None:
            highest = z.amax(1)
            top = torch.maximum(top, highest)
            if close is not None:
                close.find(z, highest, start)
        z -= anchor.unsqueeze(1)
        e = z.exp() if entropy is not None else z.exp_()
        total += e.sum(1)
        if entropy is not None:
            # 0 · −inf is nothing, not NaN: entries that cannot occur have no entropy.
            entropy += z.clamp_min_(torch.finfo(z.dtype).min).mul_(e).sum(1)
        if collision is not None:
            collision += (e * torch.e**COLLISION_SHIFT).square_().sum(1)
        if out is not None and start < stored:
            if derivative is not None:
                e *= derivative
            if label_entry is not None:
                own = e.gather(1, column).squeeze(1)
                e.scatter_(1, column, torch.where(inside, label_entry, own).unsqueeze(1))
            last = min(stop, stored)
            out[:, start:last] = e[:, : last - start]
    label_logit: Tensor | None = None
    earlier: Tensor | None = None
    if top is not None:
        inside = (labels >= 0) & (labels < head.vocab_size)
        found = _entries_logits(hidden, head, labels.clamp(0, head.vocab_size - 1))
        label_logit = torch.where(inside, found, -torch.inf)
        earlier = torch.full_like(top, -torch.inf)
        if close is not None:
            top, earlier = close.settled(hidden, head, top)
    return ExpSums(anchor, total, entropy, collision, logits, top, label_logit, earlier)


class _Close:
    """The entries whose logits come within the tolerance of their row's label. They are summed once
    more, in the order of `target_logits`: that of a product depends on its shape, and on the place
    in it.
    """

    def __init__(self, labels: Tensor, anchor: Tensor, tolerance: Tensor):  # [N] each
        self._labels, self._anchor, self._tolerance = labels, anchor, tolerance
        self._rows, self._entries = [labels[:0]], [labels[:0]]

    def find(self, z: Tensor, highest: Tensor, start: int) -> None:  # [N, C], [N]
        """Those of a tile, where none of it exceeds the label by more."""
        rows = self._may_be_equal(highest).nonzero().squeeze(1)
        if rows.numel() == 0:
            return
        z, tolerance = z[rows], self._tolerance[rows].unsqueeze(1)
        near = z >= self._anchor[rows].unsqueeze(1) - tolerance
        # Of sums of zeros, which are the same in any order, the first will do: there may be many.
        place = torch.arange(z.shape[1], device=z.device)
        near &= (tolerance > 0) | (place == z.argmax(1, keepdim=True))
        row, entry = near.nonzero(as_tuple=True)
        self._rows.append(rows[row])
        self._entries.append(entry + start)

    def settled(self, hidden: Tensor, head: Head, top: Tensor) -> tuple[Tensor, Tensor]:
        """`top` and `earlier` of `ExpSums`."""
        equal = self._may_be_equal(top)
        rows, entries = torch.cat(self._rows), torch.cat(self._entries)
        counts = equal[rows]
        rows, entries = rows[counts], entries[counts]
        z = _entries_logits(hidden, head, entries, rows)
        before = torch.where(entries < self._labels[rows], z, -torch.inf)
        least = torch.full_like(top, -torch.inf)
        settled = least.scatter_reduce(0, rows, z, "amax")
        earlier = least.scatter_reduce(0, rows, before, "amax")
        return torch.where(equal, settled, top), earlier

    def _may_be_equal(self, top: Tensor) -> Tensor:  # [N]
        return (top - self._anchor).abs() <= self._tolerance


def logits_logps(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:  # [N], [N, 2]
    dtype = accumulate_dtype(logits.dtype)
    logps = logits.new_zeros(logits.shape[0], dtype=dtype)
    lse = logits.new_zeros(logits.shape[0], 2, dtype=dtype)
    for rows in _row_blocks(labels >= 0, logits):
        z = _transform(logits[rows].to(dtype), logit_map)
        own = z.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
        top = z.amax(1)
        top = torch.where(top.isinf(), 0.0, top)  # ∞ − ∞ is taken nowhere
        log_sum = z.sub_(top.unsqueeze(1)).exp_().sum(1).log_()
        lse[rows] = torch.stack([top, log_sum], 1)
        logps[rows] = (own - top) - log_sum
    return logps, lse


def logits_logps_backward(
    grad_logps: Tensor,  # [N]
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2]
    logit_map: LogitMap,
    out: Tensor,  # [N, V]
) -> None:
    dtype = accumulate_dtype(logits.dtype)
    carries = labels >= 0
    for rows in _row_blocks(carries, logits):
        z = _transform(logits[rows].to(dtype), logit_map)
        derivative = logit_map.softcap_derivative(z)
        top, log_sum = lse[rows].unsqueeze(2).unbind(1)
        grad = z.sub_(top).sub_(log_sum).exp_().neg_()
        one = torch.ones_like(rows, dtype=dtype).unsqueeze(1)
        grad.scatter_add_(1, labels[rows].unsqueeze(1), one)
        grad *= (grad_logps[rows] * logit_map.gain).unsqueeze(1)
        if derivative is not None:
            grad *= derivative
        out[rows] = grad.to(out.dtype)
    out[(~carries).nonzero().squeeze(1)] = 0


def sequence_loss(
    logps: Tensor,  # [N]
    offsets: Tensor,  # [2B + 1]
    ref_logps: Tensor,  # [2B]
    beta: float,
    label_smoothing: float,
    average: bool,
    pairs: str,
) -> SequenceLoss:
    lengths = offsets.diff()
    sums = sequence_sums(logps, lengths)
    count = lengths.clamp(min=1).to(sums.dtype) if average else torch.ones_like(sums)
    sums = sums / count
    # In fp64, as in the other backends: a few numbers per sequence.
    rewards = beta * (sums.double() - ref_logps.double())
    chosen, rejected = (
        rewards.chunk(2) if pairs == "concatenated" else (rewards[::2], rewards[1::2])
    )
    margins = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    if label_smoothing:  # 0 times the log σ(−∞) of an impossible rejected answer is NaN
        losses = losses - label_smoothing * F.logsigmoid(-margins)
    # d loss / d margin, over the mean's B
    slope = (label_smoothing - torch.sigmoid(-margins)) / max(1, margins.numel())
    slope = (
        torch.cat([slope, -slope])
        if pairs == "concatenated"
        else torch.stack([slope, -slope], 1).flatten()
    )
    loss = losses.mean() if losses.numel() else losses.sum()
    dtype = sums.dtype
    return SequenceLoss(loss.to(dtype), sums, rewards.to(dtype), (beta * slope / count).to(dtype))


def sequence_sums(
    logps: Tensor,  # [N]
    lengths: Tensor,  # [S]
) -> Tensor:  # [S]
    """Σ of each sequence's tokens, in order, carried in fp64 so that padding and batching cannot
    show.
    """
    if lengths.numel() == 0 or logps.numel() == 0:
        return logps.new_zeros(lengths.shape)
    # unsafe: the lengths are ours, and checking them would wait for the device.
    sums = torch.segment_reduce(logps.double(), "sum", lengths=lengths, unsafe=True, initial=0)
    return sums.to(logps.dtype)


def _tile_elements(like: Tensor) -> int:
    return _TILE_ELEMENTS.get(like.device.type, _TILE_ELEMENTS_ELSEWHERE)


def _tiles(columns: int, rows: int, like: Tensor) -> list[tuple[int, int]]:
    width = max(_MIN_TILE_COLUMNS, _tile_elements(like) // max(1, rows))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def _row_blocks(carries: Tensor, logits: Tensor) -> list[Tensor]:
    """The rows that carry loss, in blocks of a tile's size."""
    block = max(1, _tile_elements(logits) // max(1, logits.shape[1]))
    return list(carries.nonzero().squeeze(1).split(block))


PRIMITIVES = frozenset(__all__)
TAKES_EXTRA = True


def available() -> tuple[bool, str]:
    return True, "PyTorch itself, on any device"


def supports(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    return True, "every device and floating-point dtype"
