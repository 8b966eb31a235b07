"""TRL 1.16's chunked log-probabilities, called as its fused lm_head calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX
from benchmarks.providers.base import LogpsProvider, missing, scattered


class TRLChunked(LogpsProvider):
    name = "trl-chunked"
    summary = "TRL 1.16: ChunkedLogProbFunction, logits in tiles of 4096 × 32768, recomputed"
    cannot = "on a CPU computes the rows without loss too"

    def absent(self, device: torch.device) -> str | None:
        return missing("trl.kernels.chunked_logprob") or missing("trl.trainer.utils")

    def token_logps(self, hidden, weight, labels, softcap):
        from trl.kernels import chunked_logprob
        from trl.trainer import utils

        mask = labels != IGNORE_INDEX
        # Where its Triton kernels run it leaves masked positions out; elsewhere it computes them.
        compact = hidden.device.type in ("cuda", "xpu")
        rows = hidden[mask] if compact else hidden.flatten(0, 1)
        targets = labels[mask] if compact else labels.clamp(min=0).flatten()
        tokens: Tensor = chunked_logprob.ChunkedLogProbFunction.apply(
            rows, weight, None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, softcap, 1.0, ()
        )[0]
        if compact:
            return scattered(tokens, mask)
        return torch.where(mask, tokens.view(mask.shape), tokens.new_zeros(()))
