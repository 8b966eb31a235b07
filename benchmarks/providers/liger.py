"""Liger-Kernel: LigerFusedLinearDPOLoss, by chunks of pairs, the logits of one chunk at a time; and
LigerFusedLinearScaledCrossEntropyFunction, −logp of each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.accuracy.oracle import Expected
from benchmarks.inputs import BETA, IGNORE_INDEX, Inputs
from benchmarks.providers.base import (
    LogpsProvider,
    Provider,
    missing,
    no_compiler,
    scattered,
)
from benchmarks.scenarios import Scenario

_SCALED = "fused_linear_scaled_cross_entropy"


class Liger(Provider):
    """`pairs_per_chunk` is Liger's chunk_size; None: all pairs in one chunk."""

    computes_reference = True  # its arguments are the reference's hidden states and weight
    cannot = (
        "no softcap and no scale of the logits; the reference's log-probabilities cannot be given, "
        "they are computed in each step; no log-probabilities of tokens"
    )

    def __init__(self, pairs_per_chunk: int | None, compiled: bool):
        self.pairs_per_chunk, self.compiles = pairs_per_chunk, compiled
        size = "all" if pairs_per_chunk is None else str(pairs_per_chunk)
        self.name = f"liger-{size}" + ("-compiled" if compiled else "")
        how = "compiled (its default)" if compiled else "not compiled"
        pairs = "all pairs at once" if pairs_per_chunk is None else f"{size} pair per chunk"
        self.summary = f"LigerFusedLinearDPOLoss, {pairs}, {how}; computes its reference"

    def absent(self, device: torch.device) -> str | None:
        return missing("liger_kernel.chunked_loss") or (
            no_compiler(device) if self.compiles else None
        )

    def refuses(self, scenario: Scenario) -> str | None:
        return "it has no softcap" if scenario.shape.softcap is not None else None

    def forward(self, inputs: Inputs) -> Expected:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        pairs = inputs.labels.shape[0] // 2
        loss_function = LigerFusedLinearDPOLoss(
            ignore_index=IGNORE_INDEX,
            beta=BETA,
            compute_nll_loss=False,
            compiled=self.compiles,
            use_ref_model=True,
            average_log_prob=False,
            chunk_size=self.pairs_per_chunk or pairs,
        )
        loss, (chosen, rejected, *_) = loss_function(
            inputs.weight,
            inputs.hidden,
            inputs.labels,
            ref_input=inputs.ref_hidden,
            ref_weight=inputs.ref_weight,
        )
        return Expected(loss, torch.cat([chosen, rejected]).detach())


class LigerScaledCrossEntropy(LogpsProvider):
    """On Hopper Liger-Kernel 0.8.5 takes its CuTe kernels, which write no logits and need
    nvidia-cutlass-dsl; elsewhere PyTorch, 512 rows at a time, recomputed in the backward.

    `hopper` is which of the two this is. Those kernels have not been run by this project: what is
    said of them is what their source says. Its other Hopper kernels, of fused_linear_cross_entropy,
    give the sum of all tokens alone, and write the logits.
    """

    def __init__(self, name: str, summary: str, hopper: bool):
        self.name, self.summary, self.hopper = name, summary, hopper
        self.compiles = hopper
        self.cannot = "no softcap; both gradients always, a frozen head's too"
        if hopper:
            self.cannot += "; bf16 and compute capability 9.0 alone"

    def absent(self, device: torch.device) -> str | None:
        there = device.type == "cuda" and torch.cuda.is_available()
        here = there and torch.cuda.get_device_capability(device) == (9, 0)
        if self.hopper and not here:
            return "its kernels need a GPU of compute capability 9.0"
        if here and not self.hopper:
            return "on this GPU it takes its Hopper kernels (liger-sm90)"
        module = "cutedsl.ops.fused_scaled_cross_entropy_sm90" if here else _SCALED
        return missing(f"liger_kernel.ops.{module}")

    def refuses(self, scenario: Scenario) -> str | None:
        if scenario.shape.softcap is not None:
            return "it has no softcap"
        if self.hopper and scenario.dtype != "bf16":
            return "its Hopper kernels take bf16 alone"
        return None

    def token_logps(self, hidden, weight, labels, softcap) -> Tensor:
        from liger_kernel.ops import fused_linear_scaled_cross_entropy as scaled

        mask = labels != IGNORE_INDEX
        nll = scaled.LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden[mask], weight, labels[mask]
        )
        return scattered(-nll, mask)
