"""flash-attention's cross-entropy: a Triton kernel over logits that are written for it.

This project has not run it: the package can be imported where its CUDA extension is, and nowhere
else. It is called by what its source says: flash_attn.ops.triton.cross_entropy.cross_entropy_loss,
which flash_attn.losses.cross_entropy wraps, returns (losses, z_losses), fp32 [N] both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX, capped
from benchmarks.providers.base import LogpsProvider, missing, scattered


class FlashAttention(LogpsProvider):
    name = "flash-attn"
    summary = "flash-attention's cross_entropy_loss of logits, which its backward overwrites"
    cannot = "writes the logits of every row with loss; softcap is eager PyTorch on them"

    def absent(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels need a CUDA GPU"
        return missing("flash_attn.ops.triton.cross_entropy")

    def token_logps(self, hidden, weight, labels, softcap) -> Tensor:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        mask = labels != IGNORE_INDEX
        logits = capped(hidden[mask] @ weight.t(), softcap)
        # No other backward reads these logits: that of tanh keeps its own result, unscaled.
        losses, _ = cross_entropy_loss(logits, labels[mask], inplace_backward=True)
        return scattered(-losses, mask)
