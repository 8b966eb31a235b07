"""What a provider is: one way to compute the DPO loss step."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from benchmarks.accuracy.oracle import Expected, dpo_loss
from benchmarks.inputs import Inputs
from benchmarks.scenarios import Scenario


class Provider(ABC):
    """One way to compute loss, sequence log-probabilities and gradients of a batch of pairs."""

    name: str
    summary: str
    cannot = ""  # of what a DPO step may want, in the words of docs/benchmarks.md
    # Cannot be given the reference's log-probabilities: runs its forward, one product more.
    computes_reference = False
    compiles = False  # the first call of a shape compiles

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run on this machine; None where it can."""
        return None

    def refuses(self, scenario: Scenario) -> str | None:
        """Why it has no answer to this scenario; None where it has."""
        return None

    @abstractmethod
    def forward(self, inputs: Inputs) -> Expected:
        """Loss and sequence log-probabilities, ready for a backward where something is trained."""

    def step(self, inputs: Inputs) -> Expected:
        """One step: forward, and backward into every tensor that the scenario trains."""
        with torch.set_grad_enabled(bool(inputs.trained)):
            out = self.forward(inputs)
        if inputs.trained:
            grads = torch.autograd.grad(out.loss, inputs.trained)
            out.hidden = grads[0]
            out.weight = grads[1] if len(grads) > 1 else None
        out.loss = out.loss.detach()
        return out


class LogpsProvider(Provider):
    """A provider of per-token log-probabilities; the loss on their sums is eager PyTorch."""

    @abstractmethod
    def token_logps(
        self,
        hidden: Tensor,  # [2B, T, D]
        weight: Tensor,  # [V, D]
        labels: Tensor,  # [2B, T]
        softcap: float | None,
    ) -> Tensor:  # [2B, T], 0 where ignored
        ...

    def forward(self, inputs: Inputs) -> Expected:
        softcap = inputs.scenario.shape.softcap
        ref_logps = inputs.ref_logps
        if self.computes_reference or inputs.scenario.reference == "forward":
            with torch.no_grad():
                ref_logps = self.token_logps(
                    inputs.ref_hidden, inputs.ref_weight, inputs.labels, softcap
                ).sum(-1)
        tokens = self.token_logps(inputs.hidden, inputs.weight, inputs.labels, softcap)
        logps = tokens.sum(-1)
        return Expected(dpo_loss(logps, ref_logps), logps.detach(), token_logps=tokens.detach())


def scattered(
    tokens: Tensor,  # [N], of the rows that carry loss
    mask: Tensor,  # [2B, T]
) -> Tensor:  # [2B, T], 0 where ignored
    return tokens.new_zeros(mask.shape).masked_scatter(mask, tokens)


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot generate code here; None where it can."""
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    if device.type == "cpu" and not any(c and shutil.which(c) for c in compilers):
        return "torch.compile needs a C++ compiler on a CPU"
    return None


def missing(module: str) -> str | None:
    """Why `module` cannot be imported; None where it can."""
    try:
        __import__(module)
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # made for other versions than are here: as good as absent
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None
