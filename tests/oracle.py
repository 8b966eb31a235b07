"""Eager PyTorch as oracle (fp64) and as baseline (the tested dtype), and the rule that compares the
three.

The rule is flash-attention's: the error against the oracle may be twice the baseline's for outputs
and three times for gradients, plus a floor of a few roundings; the largest elementwise error and
the RMS are both held to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = {
    torch.float64: 2.3e-16,
    torch.float32: 1.2e-7,
    torch.bfloat16: 7.9e-3,
    torch.float16: 9.8e-4,
}


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
    eps = EPS[baseline.dtype]
    # In fp64 the baseline is the oracle itself, and the floor is the whole allowance.
    floor = (
        slack
        * (64 if baseline.dtype == torch.float64 else 4)
        * eps
        * oracle.abs().max().clamp_min(1e-30)
    )
    for name, norm in (
        ("max", lambda t: t.abs().max()),
        ("rms", lambda t: t.square().mean().sqrt()),
    ):
        error, allowed = norm(ours - oracle), factor * norm(base - oracle) + floor
        assert error <= allowed, f"{what}: {name} error {error:.3e}, allowed {allowed:.3e}"


def grads_of(output: Tensor, upstream: Tensor, inputs) -> list[Tensor | None]:
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    got = iter(torch.autograd.grad(output, wanted, upstream))
    return [next(got) if t is not None and t.requires_grad else None for t in inputs]
