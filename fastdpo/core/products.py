"""Matrix products: what each is summed in, and how often it is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import accumulate_dtype


def lowered(lifted: Tensor, lift: float) -> Tensor:
    """In place."""
    return lifted if lift == 1.0 else lifted.mul_(1.0 / lift)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, lift: float) -> None:
    """a · b / lift, in its operands' dtype or in fp32."""
    options = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if lift == 1.0 or out.is_cpu:
        lowered(torch.mm(a, b, out=out, **options), lift)
    else:
        torch.addmm(out, a, b, beta=0, alpha=1.0 / lift, out=out, **options)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a · b where the sum is complete: accumulated in fp32 inside, rounded once at most."""
    return multiply_wide(a, b) if widens(a) or a.dtype == torch.float16 else torch.mm(a, b)


def multiply_wide(a: Tensor, b: Tensor) -> Tensor:
    """a · b in the accumulate dtype, for products that are summed further."""
    dtype = accumulate_dtype(a.dtype)
    if widens(a):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def widens(a: Tensor) -> bool:
    """Whether the matrix product itself can return 16-bit operands' fp32 sums."""
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)


def column_sums(e: Tensor, coefficients: Tensor) -> Tensor:
    """Eᵀ · coefficients in the accumulate dtype, a tile of columns at a time."""
    width = max(1, (4 << 20) // max(1, e.shape[0]))
    return torch.cat([tile.to(coefficients.dtype).t() @ coefficients for tile in e.split(width, 1)])
