"""PyTorch's own torch.nn.functional.linear_cross_entropy, which PyTorch 2.13 brought.

With `options=None` it writes all logits; with LinearCrossEntropyOptions a chunk of rows at a time.
What that costs a loss which is no sum of the tokens' losses, in products of 2·N·V·D:

    reduction="none"   keeps its inputs, multiplies for the logits again in the backward: 1 + 3
    reduction="sum"    has its gradients when the forward ends, and keeps them, one [V, D] a call,
                       until the backward scales them: 3, of one call per sequence
                       or each sequence's sum first, and then again with its gradients: 1 + 3

It multiplies for ignored rows as for others: every provider here hands it only those with loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.oracle import Expected, dpo_loss
from benchmarks.inputs import IGNORE_INDEX, Inputs, accumulated
from benchmarks.providers.base import LogpsProvider, Provider, scattered
from benchmarks.scenarios import Scenario

_ROUNDS = "no softcap and no scale of the logits; in 16 bits what it returns is rounded to 16 bits"


def _missing() -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch.nn.functional has it from PyTorch 2.13 on (this is {torch.__version__})"


def _nll(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    reduction: str,
    policy: str | None,
) -> Tensor:  # [N], or [] of a sum
    """`policy` is its acc_policy; None for its reference implementation."""
    options = None
    if policy is not None:
        # "auto" accumulates 16 bits in fp32 wherever it can; a policy that is named would do so in
        # 16 bits. A GPU that is not there cannot be asked, so that "auto" is told as well.
        options = torch.nn.LinearCrossEntropyOptions(
            acc_policy=policy, acc_dtype=accumulated(hidden.dtype)
        )
    nll = F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=options)
    return nll.to(accumulated(nll.dtype))


class LinearCrossEntropy(LogpsProvider):
    """reduction="none": −logp of each token."""

    def __init__(self, name: str, summary: str, policy: str | None):
        self.name, self.summary, self.policy = name, summary, policy
        self.cannot = _ROUNDS if policy else "writes the logits of rows with loss; " + _ROUNDS

    def absent(self, device: torch.device) -> str | None:
        if self.policy == "accurate" and device.type == "cpu":
            return "on a CPU it is torch-lce-chunked in 16 bits and torch-lce-balanced in others"
        return _missing()

    def refuses(self, scenario: Scenario) -> str | None:
        return _no_softcap(scenario)

    def token_logps(self, hidden, weight, labels, softcap) -> Tensor:
        mask = labels != IGNORE_INDEX
        return scattered(-_nll(hidden[mask], weight, labels[mask], "none", self.policy), mask)


class LinearCrossEntropySum(Provider):
    """reduction="sum", one call per sequence, and one backward through all of them."""

    name = "torch-lce-sum"
    summary = 'PyTorch: linear_cross_entropy of each sequence, reduction="sum"'
    cannot = _ROUNDS + "; no log-probabilities of tokens; keeps a gradient of the head per sequence"

    def absent(self, device: torch.device) -> str | None:
        return _missing()

    def refuses(self, scenario: Scenario) -> str | None:
        return _no_softcap(scenario)

    def forward(self, inputs: Inputs) -> Expected:
        logps = _sums(inputs.hidden, inputs.weight, inputs.labels)
        return Expected(dpo_loss(logps, _reference(inputs)), logps.detach())


class LinearCrossEntropySumTwice(LinearCrossEntropySum):
    """The sums without gradients, the loss of them, and then each sequence's gradients, scaled as
    the loss wants them: at most two [V, D] beside the gradient itself, a sequence's and the zeros
    that autograd passes to its backward, which does not read them.
    """

    name = "torch-lce-twice"
    summary = 'PyTorch: linear_cross_entropy of each sequence, reduction="sum", then its gradients'
    cannot = _ROUNDS + "; no log-probabilities of tokens"

    def step(self, inputs: Inputs) -> Expected:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        logps = _sums(hidden, weight, inputs.labels).requires_grad_(bool(inputs.trained))
        loss = dpo_loss(logps, _reference(inputs))
        out = Expected(loss.detach(), logps.detach())
        if not inputs.trained:
            return out
        (upstream,) = torch.autograd.grad(loss, logps)
        out.hidden = torch.zeros_like(hidden)
        out.weight = torch.zeros_like(weight) if inputs.weight.requires_grad else None
        for s in range(len(inputs.labels)):
            self._add_gradients(out, inputs, s, -upstream[s])
        return out

    @staticmethod
    def _add_gradients(out: Expected, inputs: Inputs, s: int, upstream: Tensor) -> None:
        """Of sequence `s`; nothing of it is left when this returns."""
        mask = inputs.mask[s]
        part = replace(inputs, hidden=inputs.hidden.detach()[s][mask].requires_grad_())
        nll = _nll(part.hidden, part.weight, inputs.labels[s][mask], "sum", "auto")
        grads = torch.autograd.grad(nll, part.trained, upstream)
        assert out.hidden is not None
        out.hidden[s, mask] = grads[0]
        if out.weight is not None:
            out.weight += grads[1]


def _sums(
    hidden: Tensor,  # [2B, T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [2B, T]
) -> Tensor:  # [2B]
    rows = zip(hidden, labels, labels != IGNORE_INDEX, strict=True)
    return -torch.stack([_nll(x[m], weight, y[m], "sum", "auto") for x, y, m in rows])


def _reference(inputs: Inputs) -> Tensor:  # [2B]
    if inputs.scenario.reference != "forward":
        return inputs.ref_logps
    with torch.no_grad():
        return _sums(inputs.ref_hidden, inputs.ref_weight, inputs.labels)


def _no_softcap(scenario: Scenario) -> str | None:
    return "it has no softcap" if scenario.shape.softcap is not None else None
