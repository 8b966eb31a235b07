"""The primitives in CUDA C++: `fastdpo._cuda` on PyTorch tensors.

Importing this module never needs the extension or a GPU; `available()` says what is missing.
`exp_logits` is not here: a matrix product with an epilogue is Triton's (or the torch backend's).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..names import CUDA
from ..objectives.layouts import PAIRS
from .contract import Head, LogitMap, SequenceLoss
from .cuda_ops import extension, supports

__all__ = [
    "PRIMITIVES",
    "LogitsLoss",
    "available",
    "logits_logps",
    "logits_logps_backward",
    "logits_sequence_loss",
    "sequence_loss",
    "supports",
    "target_logits",
]

PRIMITIVES = frozenset({"logits_logps", "logits_logps_backward", "target_logits", "sequence_loss"})
TAKES_EXTRA = False

_ops = getattr(torch.ops, CUDA)


class LogitsLoss(NamedTuple):
    """What `logits_sequence_loss` returns, in float32."""

    loss: SequenceLoss
    row_coefficients: Tensor  # [N] ∂loss/∂logps of every row, 0 where it carries no loss
    logps: Tensor  # [N]
    lse: Tensor  # [N, 2]


# ---- Whether it can run


def available() -> tuple[bool, str]:
    """Whether the CUDA C++ kernels run on this machine's current device, and why (not)."""
    try:
        built = extension()
    except ImportError as error:
        return False, (
            f"the extension fastdpo._cuda is not built ({error}); install from source with nvcc "
            "on PATH and FASTDPO_BUILD_CUDA=1"
        )
    if torch.version.hip is not None:
        return False, "this PyTorch is built for ROCm, not for CUDA"
    if not torch.cuda.is_available():
        return False, "no CUDA device: torch.cuda.is_available() is False"
    major = built.CUDART_VERSION // 1000
    if built.driver_version() < 1000 * major:
        driver = built.driver_version()
        return False, (
            f"the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, and fastdpo._cuda "
            f"was built with CUDA {major}"
        )
    try:
        built.check_architecture(*torch.cuda.get_device_capability())
    except ValueError as error:
        return False, str(error)
    return True, f"CUDA C++ for {', '.join(_with_point(a) for a in built.SASS_ARCHITECTURES)}"


# ---- The primitives (contract: fastdpo.backends)


def target_logits(
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]; outside [0, V): NaN
) -> Tensor:  # [N] float32
    return _ops.target_logits(hidden, head.weight, head.bias, labels, *_transform(head))


def logits_logps(
    logits: Tensor,  # [N, V], any row stride
    labels: Tensor,  # [N]; negative: no loss, not read; ≥ V: NaN
    logit_map: LogitMap,
    *,
    second_launch: bool = False,
) -> tuple[Tensor, Tensor]:  # [N], [N, 2] float32
    """`second_launch`: the parts of a row are put together by a launch of their own instead of by
    the row's last block. The bits are the same; which is faster is a benchmark's question.
    """
    options = (*_transform(logit_map), second_launch)
    return _ops.logits_logps(logits, labels, *options)


def logits_logps_backward(
    grad_logps: Tensor,  # [N] float32, any stride (0 where expanded)
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2] float32
    logit_map: LogitMap,
    out: Tensor,  # [N, V], of any served dtype; may be logits itself
    *,
    grad_scale: Tensor | None = None,  # [] or [1] float32: multiplies grad_logps, on the device
) -> None:
    _ops.logits_logps_backward(
        grad_logps, logits, labels, lse, *_transform(logit_map), out, grad_scale
    )


def sequence_loss(
    logps: Tensor,  # [N] float32
    offsets: Tensor,  # [2B + 1] int64
    ref_logps: Tensor,  # [2B]
    beta: float,
    label_smoothing: float,
    average: bool,
    pairs: str,
) -> SequenceLoss:
    interleaved = _interleaved(pairs)
    results = _ops.sequence_loss(
        logps, None, offsets, ref_logps, beta, label_smoothing, average, interleaved
    )
    return SequenceLoss(*results[:4])


def logits_sequence_loss(  # many parameters: those of two primitives
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]; negative: the row is in no sum and in no average
    logit_map: LogitMap,
    offsets: Tensor,  # [2B + 1] int64, over all N rows
    ref_logps: Tensor,  # [2B]
    beta: float,
    label_smoothing: float = 0.0,
    average: bool = False,
    pairs: str = "concatenated",
) -> LogitsLoss:
    """Materialized logits to the DPO sigmoid loss in one launch sequence: two kernels, no host.

    The gradient with respect to the logits is
    `logits_logps_backward(row_coefficients, …, grad_scale=∂/∂loss)`.
    """
    interleaved = _interleaved(pairs)
    *results, row_coefficients, logps, lse = _ops.logits_sequence_loss(
        logits, labels, offsets, ref_logps, *_transform(logit_map), beta, label_smoothing, average,
        interleaved,
    )  # fmt: skip
    return LogitsLoss(SequenceLoss(*results), row_coefficients, logps, lse)


def _transform(logit_map: Head | LogitMap) -> tuple[float, float, float]:
    """scale, softcap (0: none) and temperature as the ops take them."""
    return logit_map.scale, logit_map.softcap or 0.0, logit_map.temperature


def _interleaved(pairs: str) -> bool:
    if pairs not in PAIRS:
        raise ValueError(f"pairs should be one of {', '.join(PAIRS)}, got {pairs!r}")
    return pairs == "interleaved"


def _with_point(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"
