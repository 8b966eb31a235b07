"""The DPO loss and its gradients written out, in fp64 (fp32 when large), and what a provider's
errors are held to (`rule`).

    z = softcap(x · Wᵀ)      logp = z_y − logsumexp z      loss = mean −log σ(β (h_w − h_l))
    ∂loss/∂z_v = g (1[v = y] − softmax_v) · (1 − (z_v / cap)²)       g = ∂loss/∂logp

No autograd and nothing of size [N, V]: a block of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy import rule
from benchmarks.inputs import BETA, Inputs, capped

# The oracle is fp64 up to this many operations of one product, fp32 beyond.
_FP64_OPERATIONS = {"cpu": 3e11, "cuda": 1e13}
_FACTORS = {
    "loss": rule.OUTPUT,
    "logps": rule.OUTPUT,
    "hidden": rule.GRADIENT,
    "weight": rule.GRADIENT,
}


@dataclass
class Expected:
    """Results of one step, of the oracle or of a provider; gradients None where not trained."""

    loss: Tensor  # []
    logps: Tensor  # [2B] sums
    hidden: Tensor | None = None  # [2B, T, D]
    weight: Tensor | None = None  # [V, D]
    token_logps: Tensor | None = None  # [2B, T]


def dpo_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:  # [2B], [2B] -> []
    """The sigmoid loss, the first half of the sequences chosen."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def oracle_dtype(inputs: Inputs) -> torch.dtype:
    vocab, size = inputs.weight.shape
    operations = 2.0 * inputs.scenario.loss_tokens * vocab * size
    limit = _FP64_OPERATIONS["cuda" if inputs.hidden.is_cuda else "cpu"]
    return torch.float64 if operations <= limit else torch.float32


@torch.no_grad()
def oracle(inputs: Inputs, dtype: torch.dtype | None = None, block: int = 256) -> Expected:
    """The step in `dtype` (default: `oracle_dtype`), gradients for what the scenario trains."""
    dtype = dtype or oracle_dtype(inputs)
    softcap = inputs.scenario.shape.softcap
    weight, labels = inputs.weight.to(dtype), inputs.labels.flatten()
    index = inputs.mask.flatten().nonzero().squeeze(1)
    rows = inputs.hidden.flatten(0, 1)

    def logits(part: Tensor) -> tuple[Tensor, Tensor]:
        x = rows[part].to(dtype)
        return x, capped(x @ weight.t(), softcap)

    tokens = torch.zeros(labels.shape, device=labels.device, dtype=dtype)
    for part in index.split(block):
        _, z = logits(part)
        tokens[part] = z.gather(1, labels[part].unsqueeze(1)).squeeze(1) - z.logsumexp(1)
    sums = tokens.view(inputs.labels.shape).sum(-1)
    with torch.enable_grad():
        leaf = sums.clone().requires_grad_()
        loss = dpo_loss(leaf, _reference_logps(inputs, dtype))
        (upstream,) = torch.autograd.grad(loss, leaf)
    expected = Expected(loss.detach(), sums, token_logps=tokens.view(inputs.labels.shape))
    if not inputs.trained:
        return expected

    per_row = upstream.repeat_interleave(inputs.labels.shape[1])
    grad_rows = torch.zeros(rows.shape, device=rows.device, dtype=dtype)
    grad_weight = torch.zeros_like(weight) if inputs.weight.requires_grad else None
    for part in index.split(block):
        x, z = logits(part)
        grad = -torch.softmax(z, 1)
        grad[torch.arange(len(part), device=z.device), labels[part]] += 1
        grad *= per_row[part].unsqueeze(1)
        if softcap is not None:
            grad *= 1 - (z / softcap).square()
        grad_rows[part] = grad @ weight
        if grad_weight is not None:
            grad_weight.addmm_(grad.t(), x)
    expected.hidden = grad_rows.view(inputs.hidden.shape)
    expected.weight = grad_weight
    return expected


def _reference_logps(inputs: Inputs, dtype: torch.dtype) -> Tensor:  # [2B]
    """What a provider is given, so that its error is its own."""
    return inputs.ref_logps.to(dtype)


def errors(got: Expected, expected: Expected) -> dict[str, dict[str, float]]:
    """Per quantity the largest and the RMS error; infinite where anything is not finite."""
    out = {}
    for name in _FACTORS:
        truth, value = getattr(expected, name), getattr(got, name)
        if truth is None:
            continue
        difference = value.detach().to(truth.dtype) - truth
        if not bool(difference.isfinite().all()):
            out[name] = {"max": float("inf"), "rms": float("inf")}
        else:
            out[name] = rule.sizes(difference)
    return out


def verdict(
    mine: dict[str, dict[str, float]],
    baseline: dict[str, dict[str, float]],
    expected: Expected,
    eager: Expected,
) -> list[str]:
    """Where `mine` breaks the rule, in words; empty where it is kept."""
    broken = []
    for name, factor in _FACTORS.items():
        if name not in mine:
            continue
        theirs = baseline[name]
        if name == "loss":  # one number may be right by luck: its error is its logps' times β
            of_logps = baseline["logps"]
            theirs = {norm: max(theirs[norm], BETA * of_logps[norm]) for norm in theirs}
        floor = rule.floor(getattr(expected, name), getattr(eager, name).dtype)
        broken += [f"{name} {text}" for text in rule.broken(mine[name], theirs, factor, floor)]
    return broken


def accuracy_record(got: Expected, expected: Expected, eager: Expected) -> dict[str, Any]:
    """What the JSON keeps of a check."""
    mine, baseline = errors(got, expected), errors(eager, expected)
    broken = verdict(mine, baseline, expected, eager)
    return {"errors": mine, "eager_errors": baseline, "passes": not broken, "broken": broken}
