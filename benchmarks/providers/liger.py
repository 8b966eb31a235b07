"""Liger-Kernel's LigerFusedLinearDPOLoss: chunks of pairs, logits of one chunk at a time."""

from __future__ import annotations

import torch

from benchmarks.accuracy.oracle import Expected
from benchmarks.inputs import BETA, IGNORE_INDEX, Inputs
from benchmarks.providers.base import Provider, missing, no_compiler
from benchmarks.scenarios import Scenario


class Liger(Provider):
    """`pairs_per_chunk` is Liger's chunk_size; None: all pairs in one chunk."""

    computes_reference = True  # its arguments are the reference's hidden states and weight

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
