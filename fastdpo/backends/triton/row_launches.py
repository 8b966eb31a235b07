"""What primitives of one kernel launch: target_logits, logits_logps both ways, sequence_loss."""

from __future__ import annotations

import triton
from torch import Tensor

from ..contract import Head, LogitMap, SequenceLoss
from .exp_logits import curve
from .launch import Launch
from .logits_logps import logits_logps_kernel
from .logits_logps_backward import logits_logps_backward_kernel
from .sequence_loss import sequence_loss_kernel
from .target_logits import target_logits_kernel

# Elements of a row that a program holds at once: 32 per thread, four 16-byte loads of 16-bit
# numbers in flight (where V is a multiple of 16).
_FORWARD_BLOCK, _BACKWARD_BLOCK, _DEPTH_BLOCK = 4096, 4096, 2048


def target_logits(
    hidden: Tensor,  # [N, D]
    head: Head,
    labels: Tensor,  # [N]
    logits: Tensor,  # [N] fp32, written
) -> Launch:
    inner, outer = curve(head)
    arguments = {
        "hidden_ptr": hidden, "weight_ptr": head.weight, "bias_ptr": head.bias,
        "labels_ptr": labels,
        "logit_ptr": logits, "hidden_stride": hidden.stride(0),
        "weight_stride": head.weight.stride(0),
        "weight_depth_stride": head.weight.stride(1), "V": head.vocab_size, "D": hidden.shape[1],
        "inner": inner, "outer": outer, "BLOCK_D": _block(hidden.shape[1], _DEPTH_BLOCK),
    }  # fmt: skip
    return Launch(target_logits_kernel, (hidden.shape[0],), arguments)


def logits_logps(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    logit_map: LogitMap,
    logps: Tensor,  # [N] fp32, written
    lse: Tensor,  # [N, 2] fp32, written
) -> Launch:
    inner, outer = curve(logit_map)
    arguments = {
        "logits_ptr": logits, "labels_ptr": labels, "logps_ptr": logps, "lse_ptr": lse,
        "row_stride": logits.stride(0), "column_stride": logits.stride(1), "V": logits.shape[1],
        "inner": inner, "outer": outer, "BLOCK_V": _block(logits.shape[1], _FORWARD_BLOCK),
    }  # fmt: skip
    return Launch(logits_logps_kernel, (logits.shape[0],), arguments)


def logits_logps_backward(
    grad_logps: Tensor,  # [N] fp32, contiguous
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2] fp32
    logit_map: LogitMap,
    out: Tensor,  # [N, V], written
) -> Launch:
    inner, outer = curve(logit_map)
    block = _block(logits.shape[1], _BACKWARD_BLOCK)
    arguments = {
        "grad_ptr": grad_logps, "logits_ptr": logits, "labels_ptr": labels, "lse_ptr": lse,
        "out_ptr": out,
        "row_stride": logits.stride(0), "column_stride": logits.stride(1),
        "out_row_stride": out.stride(0), "out_column_stride": out.stride(1), "V": logits.shape[1],
        "inner": inner, "outer": outer, "gain": logit_map.gain, "BLOCK_V": block,
    }  # fmt: skip
    grid = (logits.shape[0] * triton.cdiv(logits.shape[1], block),)
    return Launch(logits_logps_backward_kernel, grid, arguments)


def sequence_loss(
    logps: Tensor,  # [N] fp32
    offsets: Tensor,  # [2B + 1]
    ref_logps: Tensor,  # [2B] fp32
    beta: float,
    label_smoothing: float,
    average: bool,
    interleaved: bool,
    out: SequenceLoss,  # fp32, written
) -> Launch:
    arguments = {
        "logps_ptr": logps, "offsets_ptr": offsets, "ref_ptr": ref_logps, "loss_ptr": out.loss,
        "sums_ptr": out.logps, "rewards_ptr": out.rewards,
        "coefficients_ptr": out.coefficients, "pairs": ref_logps.shape[0] // 2,
        "beta": beta, "label_smoothing": label_smoothing, "AVERAGE": average,
        "INTERLEAVED": interleaved,
        "BLOCK_B": 16, "BLOCK_T": 128,
    }  # fmt: skip
    return Launch(sequence_loss_kernel, (1,), arguments, warps=8)


def _block(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))
