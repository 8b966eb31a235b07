"""Matrix products: what each is summed in, and how often it is rounded."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import accumulate_dtype
from ..backends.workspace import recompute_columns

_ROWS_WIDENED = 4096  # of a product's first factor, at a time


def lowered(lifted: Tensor, lift: float) -> Tensor:
    """In place."""
    return lifted if lift == 1.0 else lifted.mul_(1.0 / lift)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, lift: float) -> None:
    """a · b / lift, in its operands' dtype or in fp32."""
    options = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if widened(a):
        blocks = max(1, -(-a.shape[0] // _ROWS_WIDENED))
        for into, rows in zip(out.tensor_split(blocks), a.tensor_split(blocks), strict=True):
            into.copy_(lowered(multiply_wide(rows, b), lift))
    elif lift == 1.0 or out.is_cpu:
        lowered(torch.mm(a, b, out=out, **options), lift)
    else:
        torch.addmm(out, a, b, beta=0, alpha=1.0 / lift, out=out, **options)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a · b where the sum is complete: accumulated in fp32 inside, rounded once at most."""
    wide = widens(a) or widened(a) or a.dtype == torch.float16
    return multiply_wide(a, b) if wide else torch.mm(a, b)


def multiply_wide(a: Tensor, b: Tensor) -> Tensor:
    """a · b in the accumulate dtype, for products that are summed further."""
    dtype = accumulate_dtype(a.dtype)
    if widens(a):
        return torch.mm(a, b, out_dtype=dtype)
    if a.dtype == dtype:
        return torch.mm(a, b)
    total = a.new_zeros((a.shape[0], b.shape[1]), dtype=dtype)
    add_widened(total, a, b)
    return total


def add_widened(total: Tensor, a: Tensor, b: Tensor) -> None:  # [M, N], [M, K], [K, N]
    """total += a · b, with both widened to its dtype first, a few columns of a at a time."""
    width = recompute_columns(max(total.shape), a.shape[1], total)
    for part, rows in zip(a.split(width, 1), b.split(width), strict=True):
        total.addmm_(part.to(total.dtype), rows.to(total.dtype))


def widens(a: Tensor) -> bool:
    """Whether the matrix product itself can return 16-bit operands' fp32 sums."""
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)


def widened(a: Tensor) -> bool:
    """Whether 16-bit operands are multiplied as fp32: on processors without bf16 instructions that
    is three times as fast as PyTorch's own product of them, whose sums are fp32 too; in fp16,
    hundreds of times (docs/correctness.md).
    """
    if not a.is_cpu:
        return False
    return a.dtype == torch.float16 or (a.dtype == torch.bfloat16 and not _has_bf16_products())


@functools.cache
def _has_bf16_products() -> bool:
    """As PyTorch says; true where it says nothing (an older one, a processor other than x86)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", True))  # those with AMX have it too


def column_sums(e: Tensor, coefficients: Tensor) -> Tensor:
    """Eᵀ · coefficients in the accumulate dtype, a tile of columns at a time."""
    width = max(1, (4 << 20) // max(1, e.shape[0]))
    return torch.cat([tile.to(coefficients.dtype).t() @ coefficients for tile in e.split(width, 1)])
