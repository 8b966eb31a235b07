"""Apple's Cut Cross-Entropy with reduction="none": −logp of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX
from benchmarks.providers.base import LogpsProvider, missing, no_compiler


class CutCrossEntropy(LogpsProvider):
    """The Triton kernels; `filter_eps` "auto" is the package's default, None its exact mode."""

    def __init__(self, name: str, summary: str, impl: str, filter_eps: str | None = "auto"):
        self.name, self.summary = name, summary
        self.impl, self.filter_eps = impl, filter_eps
        self.cannot = "no scale of the logits"
        if impl == "cce":
            self.cannot += "; CUDA alone"
        if filter_eps is not None and impl == "cce":
            self.cannot += "; gradients that it takes for small are left out"
        self.compiles = True  # it compiles parts of itself in either implementation

    def absent(self, device: torch.device) -> str | None:
        if self.impl == "cce" and device.type != "cuda":
            return "its kernels need a CUDA GPU"
        return missing("cut_cross_entropy") or no_compiler(device)

    def token_logps(self, hidden, weight, labels, softcap) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(
            hidden,
            weight,
            labels,
            ignore_index=IGNORE_INDEX,
            softcap=softcap,
            reduction="none",
            filter_eps=self.filter_eps,
            impl=self.impl,
        )
        return -nll.to(torch.promote_types(nll.dtype, torch.float32))
