"""The rule of accuracy, which is flash-attention's: for benchmarks and tests alike.

    |got − oracle| ≤ factor · |baseline − oracle| + floor

in the largest element and in the RMS. The oracle is fp64 PyTorch, the baseline eager PyTorch in the
dtype that is tested; the factor is 2 for outputs and 3 for gradients, the floor a few roundings of
the oracle's largest element.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT, GRADIENT = 2.0, 3.0
_ROUNDINGS = 4
_ROUNDINGS_FP64 = 64  # there the baseline is the oracle itself, and the floor the whole allowance


def sizes(difference: Tensor) -> dict[str, float]:
    """Of an error: the largest element and the RMS."""
    return {
        "max": float(difference.abs().max()),
        "rms": float(difference.square().mean().sqrt()),
    }


def floor(oracle: Tensor, baseline: torch.dtype) -> float:
    roundings = _ROUNDINGS_FP64 if baseline == torch.float64 else _ROUNDINGS
    return roundings * torch.finfo(baseline).eps * float(oracle.abs().max().clamp_min(1e-30))


def broken(
    error: dict[str, float], baseline: dict[str, float], factor: float, floor: float
) -> list[str]:
    """Where the rule is broken, in words. What is not a number breaks it."""
    found = []
    for name, size in error.items():
        allowed = factor * baseline[name] + floor
        if not size <= allowed:
            found.append(f"{name} error {size:.2e}, allowed {allowed:.2e}")
    return found
