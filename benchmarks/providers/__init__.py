"""Everybody who is measured, in the order of the tables.

A provider that is not installed or cannot run says why (`absent`), one that has no answer to a
scenario says so (`refuses`); both are listed, neither is left out.
"""

from __future__ import annotations

from benchmarks.providers.base import LogpsProvider, Provider
from benchmarks.providers.cce import CutCrossEntropy
from benchmarks.providers.eager import Compiled, Eager, EagerReference, SelectiveLogSoftmax
from benchmarks.providers.flash_attn import FlashAttention
from benchmarks.providers.liger import Liger, LigerScaledCrossEntropy
from benchmarks.providers.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropySum,
    LinearCrossEntropySumTwice,
)
from benchmarks.providers.ours import EVERYTHING, FastDPO
from benchmarks.providers.trl import TRLChunked

__all__ = ["BASELINES", "LogpsProvider", "Provider", "by_name", "registry"]

# Whose error the rule compares with: eager PyTorch, with or without the reference's forward.
BASELINES = {False: Eager(), True: EagerReference()}


def registry() -> list[Provider]:
    """Every provider."""
    return [
        FastDPO("fastdpo", "as it is called by default", None, None),
        FastDPO("fastdpo-rows", "given the rows that carry loss", None, None, rows_known=True),
        FastDPO("fastdpo-w0", "workspace 0", None, 0),
        FastDPO("fastdpo-wmax", "a workspace for all of E", None, EVERYTHING),
        FastDPO("fastdpo-torch", "the torch backend", "torch", None),
        FastDPO("fastdpo-triton", "the triton backend", "triton", None),
        FastDPO("fastdpo-cuda", "the cuda backend", "cuda", None),
        Eager(),
        SelectiveLogSoftmax(),
        Compiled(),
        LinearCrossEntropy(
            "torch-lce", "PyTorch: linear_cross_entropy as called by default: all logits", None
        ),
        LinearCrossEntropy(
            "torch-lce-chunked",
            "PyTorch: linear_cross_entropy in chunks, with its own choice of a policy",
            "auto",
        ),
        # Its third policy, "compact", is what it chooses in fp32 and on a GPU; on a CPU it is
        # "balanced" in 16 bits.
        LinearCrossEntropy(
            "torch-lce-balanced",
            'PyTorch: linear_cross_entropy in chunks, the policy "balanced"',
            "balanced",
        ),
        LinearCrossEntropy(
            "torch-lce-accurate",
            'PyTorch: linear_cross_entropy in chunks, the policy "accurate"',
            "accurate",
        ),
        LinearCrossEntropySum(),
        LinearCrossEntropySumTwice(),
        TRLChunked(),
        Liger(1, compiled=True),
        Liger(1, compiled=False),
        Liger(None, compiled=True),
        LigerScaledCrossEntropy(
            "liger-scaled", "Liger-Kernel's scaled cross-entropy, in PyTorch by 512 rows", False
        ),
        LigerScaledCrossEntropy(
            "liger-sm90", "Liger-Kernel's scaled cross-entropy, its CuTe kernels for Hopper", True
        ),
        FlashAttention(),
        CutCrossEntropy(
            "cce", "Cut Cross-Entropy, its default: small gradients filtered out", "cce"
        ),
        CutCrossEntropy("cce-exact", "Cut Cross-Entropy without its filter", "cce", None),
        CutCrossEntropy(
            "cce-compile", "Cut Cross-Entropy's torch_compile implementation", "torch_compile"
        ),
    ]


def by_name(names: list[str] | None = None) -> list[Provider]:
    """The providers named, in the registry's order; all of them without names."""
    everyone = registry()
    known = [p.name for p in everyone]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"providers should be among {', '.join(known)}, got {', '.join(unknown)}")
    return [p for p in everyone if names is None or p.name in names]
