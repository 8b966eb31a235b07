"""Rows that are equal have equal results, to the bit and wherever they stand: masks by a quantile
of the entropy (GRPO's) depend on it.
"""

from __future__ import annotations

import pytest
import torch

from fastdpo.backends import workspace
from fastdpo.loss import linear_logps

STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 66, 79, 80, 129, 200])
@pytest.mark.parametrize(("dim", "vocab"), [(32, 97), (896, 1500), (100, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_rows(dtype, dim, vocab, count, monkeypatch):
    """Of several blocks, of which the last may have one row."""
    monkeypatch.setattr(workspace, "_BLOCK_BYTES", {"cpu": 1, "cuda": 1})  # 64 rows a block
    weight = (0.1 * torch.randn(vocab, dim)).to(dtype)
    row = torch.randn(1, dim).to(dtype)
    hidden = torch.randn(count, dim).to(dtype)
    equal = torch.arange(count) % 3 == 0
    equal[-1] = True
    hidden[equal] = row
    labels = torch.full((count,), vocab // 2)
    leaf = hidden.clone().requires_grad_()
    found = linear_logps(leaf, weight.requires_grad_(), labels, stats=STATS)
    (grad,) = torch.autograd.grad((found.logps + found.entropy).sum(), leaf)
    for name, values in (*found._asdict().items(), ("gradient", grad)):
        same = values.detach()[equal]
        assert (same == same[0]).all(), name
