"""The gradient where the entropy enters the loss: equation (7) of `linear`."""

from __future__ import annotations

import torch

from ..backends.torch import logits_of
from ..backends.workspace import recompute_columns
from .row_state import logps_of, set_label_entries


def with_entropy(blocks, upstream, x, head, labels, state, kept):
    """E to E∘c of (7), each row without its size. Elementwise, so that it costs no product but with
    a softcap, whose derivative in E hides the logits.
    """
    size = upstream.size
    share = torch.where(size > 0, 1.0 / size, 0.0)
    g, h = upstream.logps * share, upstream.entropy * share
    log_inverse, logps = torch.log(state.inverse), logps_of(state)
    own = torch.exp(state.target - state.anchor)
    own = torch.where(own == 0, 0.0, own * h * (logps + upstream.value))
    entry = own - g * state.sum
    derivative = head.softcap_derivative(state.target)
    entry = entry if derivative is None else entry * derivative
    base = g + h * (log_inverse + upstream.value)
    for first, last, whole in blocks:
        spent = kept is None or kept.spendable or first >= kept.columns
        width = last - first if spent else recompute_columns(len(x), last - first, x)
        for start in range(first, last, max(1, width)):
            stop = min(start + width, last)
            e = whole[:, start - first : stop - first]
            e = e if spent else e.clone()
            part = head.columns(start, stop)
            for rows in _few_rows(len(x), stop - start):
                wide = e[rows].to(g.dtype)
                if head.softcap is None:
                    logits = torch.log(wide)  # from the anchor
                else:
                    logits = logits_of(x[rows], part) - state.anchor[rows].unsqueeze(1)
                c = torch.addcmul(base[rows].unsqueeze(1), h[rows].unsqueeze(1), logits)
                e[rows] = torch.where(wide > 0, wide * c, 0.0).to(e.dtype)  # p log p is 0 at 0
            set_label_entries(e, labels - start, entry)
            yield start, stop, e


def _few_rows(n: int, columns: int) -> list[slice]:
    """So that what is elementwise in fp32 holds 64 MiB at most."""
    block = max(1, (16 << 20) // max(1, columns))
    return [slice(start, start + block) for start in range(0, n, block)]
