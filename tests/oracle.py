"""Eager PyTorch as oracle (fp64) and as baseline (the tested dtype), and the assertion that what is
tested keeps the rule of accuracy (`benchmarks.accuracy.rule`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.accuracy import rule


def eager_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def eager_logps(
    hidden, weight, labels, bias=None, ignore_index=-100, upcast=True, **head
) -> Tensor:
    """Per-token log-probabilities by log_softmax and gather, 0 where ignored; `upcast` the logits
    as trainers do.
    """
    z = eager_logits(hidden, weight, bias, **head)
    if upcast and z.dtype in (torch.bfloat16, torch.float16):
        z = z.float()
    mask = labels != ignore_index
    safe = labels.masked_fill(~mask, 0)
    logps = z.log_softmax(-1).gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, logps, torch.zeros((), dtype=logps.dtype))


def assert_as_accurate(
    ours: Tensor, baseline: Tensor, oracle: Tensor, factor: float, what: str, slack: float = 1.0
):
    """|ours − oracle| ≤ factor · |baseline − oracle| + floor, in the maximum and in the RMS."""
    assert ours.shape == oracle.shape, f"{what}: shape {ours.shape}, expected {oracle.shape}"
    ours, base, oracle = ours.double(), baseline.double(), oracle.double()
    assert ours.isfinite().all(), f"{what}: not finite"
    if oracle.numel() == 0:
        return
    floor = slack * rule.floor(oracle, baseline.dtype)
    broken = rule.broken(rule.sizes(ours - oracle), rule.sizes(base - oracle), factor, floor)
    assert not broken, f"{what}: {'; '.join(broken)}"


def grads_of(output: Tensor, upstream: Tensor, inputs) -> list[Tensor | None]:
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    got = iter(torch.autograd.grad(output, wanted, upstream))
    return [next(got) if t is not None and t.requires_grad else None for t in inputs]
