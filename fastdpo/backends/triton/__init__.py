"""The primitives as Triton kernels, for NVIDIA GPUs from Ampere on and AMD's MI300.

The contract is `fastdpo.backends.contract`.

    target_logits.py, exp_logits_*.py, reduce_sums.py   hidden, head -> logits, exponentials, sums
    settle_ties.py                                      is the label the first maximum?
    logits_logps.py, logits_logps_backward.py           materialized logits
    sequence_loss.py                                    log-probabilities -> the DPO sigmoid loss
    epilogue.py, language.py                            what kernels share
    exp_logits.py, row_launches.py, launch.py           what a primitive launches, and with what
    configs.py, autotune.py                             tile shapes per architecture
    ops.py                                              the same as torch.library ops

Importing this imports triton; `fastdpo` itself does not.
"""

from __future__ import annotations

import re

import torch
import triton
from torch import Tensor

from ..contract import FIELDS, ExpSums, Head, LogitMap, SequenceLoss
from . import ops
from .configs import CONFIGS, supported_arch
from .exp_logits import STATS
from .launch import interpreted, target_of

__all__ = [
    "PRIMITIVES",
    "available",
    "exp_logits",
    "logits_logps",
    "logits_logps_backward",
    "sequence_loss",
    "supports",
    "target_logits",
]

OLDEST = (3, 6)  # of Triton: where what these kernels use is as they use it
PRIMITIVES = frozenset(
    {"target_logits", "exp_logits", "logits_logps", "logits_logps_backward", "sequence_loss"}
)

TAKES_EXTRA = False


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and why or why not, in words."""
    if _version() < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return False, f"Triton {triton.__version__} is older than {oldest}"
    if interpreted():
        return True, "Triton's interpreter (TRITON_INTERPRET=1): correct, on any device, and slow"
    if not torch.cuda.is_available():
        return (
            False,
            "PyTorch sees no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported",
        )
    arch = target_of(torch.empty(0, device="cuda")).arch
    if supported_arch(arch) is None:
        known = ", ".join(name for name in CONFIGS if name != "interpreter")
        return False, f"there is no configuration for {arch}; there is one for {known}"
    return True, f"{torch.cuda.get_device_name()} ({arch})"


def supports(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether tensors may lie on this device and have this dtype, and why not."""
    if device.type != "cuda" and not interpreted():
        return (
            False,
            f"the kernels run on GPUs, not on {device.type} (TRITON_INTERPRET=1 is not set)",
        )
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"the kernels accumulate in fp32; {dtype} needs another backend"
    return True, f"{dtype} on {device.type}"


def target_logits(
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]; outside [0, V): the label lies elsewhere, and the logit is 0
) -> Tensor:  # [N] fp32
    return ops.target_logits(_contiguous_rows(hidden), *_flat(head), labels)


def exp_logits(  # many parameters: the contract's
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
    anchor: Tensor,  # [N] fp32
    *,
    fixed_anchor: bool = False,
    reanchored: Tensor | None = None,  # [N] bool
    out: Tensor | None = None,  # [N, K]
    label_entry: Tensor | None = None,  # [N] fp32
    stats: tuple[str, ...] = (),
    tolerance: Tensor | None = None,  # [N] fp32
) -> ExpSums:
    asked = [name for name in STATS if name in stats]
    out = out if out is not None and out.shape[1] else None
    entry = None if out is None else label_entry
    new_anchor, sums = ops.exp_logits(
        _contiguous_rows(hidden), *_flat(head), labels, anchor, fixed_anchor, reanchored, out,
        entry, ",".join(asked), tolerance,
    )  # fmt: skip
    fields = [field for name in asked for field in FIELDS[name]]
    found = dict(zip(fields, sums[1:], strict=True))
    return ExpSums(anchor if fixed_anchor else new_anchor, sums[0], **found)


def logits_logps(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    logit_map: LogitMap,
) -> tuple[Tensor, Tensor]:  # [N], [N, 2] fp32
    curve = (logit_map.scale, logit_map.softcap, logit_map.temperature)
    return ops.logits_logps(logits, labels, *curve)


def logits_logps_backward(
    grad_logps: Tensor,  # [N]
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2] fp32
    logit_map: LogitMap,
    out: Tensor,  # [N, V]
) -> None:
    curve = (logit_map.scale, logit_map.softcap, logit_map.temperature)
    if out is logits:
        ops.logits_logps_backward_(grad_logps, logits, labels, lse, *curve)
    else:
        ops.logits_logps_backward(grad_logps, logits, labels, lse, *curve, out)


def sequence_loss(
    logps: Tensor,  # [N]
    offsets: Tensor,  # [2B + 1]
    ref_logps: Tensor,  # [2B]
    beta: float,
    label_smoothing: float,
    average: bool,
    pairs: str,
) -> SequenceLoss:
    interleaved = pairs == "interleaved"
    return SequenceLoss(
        *ops.sequence_loss(logps, offsets, ref_logps, beta, label_smoothing, average, interleaved)
    )


def _version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


def _flat(head: Head) -> tuple[Tensor, Tensor | None, float, float | None, float]:
    return head.weight, head.bias, head.scale, head.softcap, head.temperature


def _contiguous_rows(hidden: Tensor) -> Tensor:  # [N, D] -> [N, D]
    """hidden with contiguous rows, which it has already unless the caller sliced D."""
    if hidden.stride(1) != 1:
        return hidden.contiguous()
    if hidden.shape[0] == 1:
        # One row's stride means nothing and may be anything; the tile is chosen by it.
        return hidden[0].unsqueeze(0)
    return hidden
