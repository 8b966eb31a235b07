"""The precision that objectives are computed in, and what happens where it ends.

Sequence log-probabilities come in fp32 and losses leave in fp32; what lies between is computed in
fp64. It is a few numbers per pair, and fp32 would lose what its ends can hold: an answer of
probability 1 − 1e-20 has the log-probability −1e-20, which is an fp32 number, and log-odds of 46.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Exponentials are continued by their tangent from here: the order of scores and the signs of
# margins are kept for any log-ratio, and e^280 = 4e121 is far beyond fp32 (3e38) while fp64 (2e308)
# holds its square.
MAX_EXPONENT: Final = 280.0
# Further than any exponent, and its product with e^280 is finite.
_FAR: Final = 1e150


def widened(x: Tensor) -> Tensor:
    """The same numbers in fp64. A gradient that the narrower dtype cannot hold comes back as its
    largest number: an infinite one would make NaN of every weight."""
    return x if x.dtype == torch.float64 else _Widened.apply(x)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`. Finite numbers stay finite: what is beyond 2⁻¹⁶ of its largest number is
    that (which leaves room for weights and sums), with the gradient of what it stands for."""
    return x if x.dtype == dtype else _Narrowed.apply(x, dtype)


def exp(x: Tensor) -> Tensor:
    """eˣ, finite and increasing also where it is not an fp64 number."""
    return torch.where(x > MAX_EXPONENT, _tangent(x), torch.exp(x.clamp(max=MAX_EXPONENT)))


def expm1(x: Tensor) -> Tensor:
    """eˣ − 1, likewise. PyTorch's gradient is the rounded eˣ − 1 plus 1, which is 0 from −37 on."""
    return torch.where(x < -1.0, exp(x) - 1.0, _expm1(x.clamp(min=-1.0)))


def _expm1(x: Tensor) -> Tensor:
    return torch.where(x > MAX_EXPONENT, _tangent(x), torch.expm1(x.clamp(max=MAX_EXPONENT)))


def _tangent(x: Tensor) -> Tensor:
    return math.exp(MAX_EXPONENT) * (1.0 - MAX_EXPONENT + x.clamp(MAX_EXPONENT, _FAR))


def logistic(x: Tensor) -> Tensor:
    """σ(x), whose gradient is σ(x) · σ(−x) for every x: PyTorch takes σ · (1 − σ) of the rounded σ,
    which is 0 from x = 37 on (in fp32 from 17), where e⁻ˣ is the right number."""
    return torch.exp(F.logsigmoid(x))


class _Widened(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.double()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        largest = torch.finfo(ctx.dtype).max
        return grad.clamp(-largest, largest).to(ctx.dtype)


class _Narrowed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        largest = torch.finfo(dtype).max * 2.0**-16
        return torch.where(x.isinf(), x, x.clamp(-largest, largest)).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
