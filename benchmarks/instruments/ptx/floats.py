"""The arithmetic that numpy does not have: one rounding at a time, as the hardware does it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

BLUR = True  # approximations err; False: they are as near as can be
F32, F64, U32, U64 = np.float32, np.float64, np.uint32, np.uint64
_NORMAL = float(np.finfo(F32).tiny)


def fma32(a, b, c) -> np.ndarray:
    """a · b + c with one rounding, in fp32.

    The product is exact in fp64. Rounding their sum to fp64 and then to fp32 errs only where the
    first lands in the middle between two numbers of fp32, or below its normal ones.
    """
    product = np.multiply(a, b, dtype=F64)
    c = np.asarray(c, F64)
    total = product + c
    middle = (np.atleast_1d(total).view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    small = np.abs(total) < _NORMAL
    if np.count_nonzero(middle) or (
        np.count_nonzero(small) and np.count_nonzero(small & (total != 0))
    ):
        total = _to_odd(product, c, total)
    return total.astype(F32)


def _to_odd(product, c, total) -> np.ndarray:
    """`total` with a last bit that says whether anything was lost: a second rounding cannot err."""
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = np.atleast_1d(total).view(U64)
    lost = np.broadcast_to(np.atleast_1d(lost), bits.shape)
    even = (bits & U64(1)) == 0
    step = even & np.isfinite(lost) & (lost != 0)
    outwards = (lost > 0) == (np.atleast_1d(total) > 0)
    bits = np.where(step, np.where(outwards, bits + U64(1), bits - U64(1)), bits)
    return bits.view(F64).reshape(np.shape(total))


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a · b + c with one rounding, in fp64: exact where nothing is lost, else in fractions."""
    a, b, c = np.broadcast_arrays(np.asarray(a, F64), b, c)
    rows = np.stack([a, b, c], -1).reshape(-1, 3)
    distinct, where = np.unique(rows.view(U64), axis=0, return_inverse=True)
    results = np.array([_fma64(*row) for row in distinct.view(F64).tolist()], F64)
    return results[where.reshape(-1)].reshape(a.shape)


def _fma64(a: float, b: float, c: float) -> float:
    plain = float(F64(a) * F64(b) + F64(c))
    if not np.isfinite([a, b, c]).all() or a == 0.0 or b == 0.0 or c == 0.0:
        return plain
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return plain
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal fp32 numbers as zeros of their sign."""
    x = np.asarray(x, F32)
    small = np.abs(x) < F32(_NORMAL)
    return np.where(small, np.copysign(F32(0), x), x) if np.count_nonzero(small) else x


def maximum(a, b):
    """The number where one is NaN; +0 above −0."""
    found = np.fmax(a, b)
    return np.where((a == 0) & (b == 0), a + b, found) if (found == 0).any() else found


def minimum(a, b):
    found = np.fmin(a, b)
    return np.where((a == 0) & (b == 0), -((-a) + (-b)), found) if (found == 0).any() else found


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of the nearest bf16, ties to even."""
    bits = np.atleast_1d(np.asarray(x, F32)).view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    nan = np.isnan(np.atleast_1d(x))
    return np.where(nan, 0x7FFF, rounded).astype(np.uint16).reshape(np.shape(x))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.atleast_1d(bits).astype(U32) << U32(16)).view(F32).reshape(np.shape(bits))


def to_f16(x: np.ndarray) -> np.ndarray:
    half = np.atleast_1d(np.asarray(x)).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), half).reshape(np.shape(x))


def from_f16(bits: np.ndarray) -> np.ndarray:
    return np.atleast_1d(bits).view(np.float16).astype(F32).reshape(np.shape(bits))


def to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 -> fp32 bits with 10 bits of mantissa, ties away from zero."""
    bits = np.asarray(x, F32).view(U32)
    rounded = (bits + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def tf32_of(bits: np.ndarray) -> np.ndarray:
    """What a matrix instruction sees of an fp32 operand: the upper 19 bits."""
    return (bits & U32(0xFFFFE000)).view(F32)


# ---- Approximations: the nearest number, then moved by what the instruction's documentation
# allows, always alike for the same argument.


def _blur(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """fp64 -> fp32, off by −1, 0 or 1 units in the last place."""
    near = np.asarray(exact).astype(F32)
    if not BLUR:
        return near
    mixed = (np.asarray(x, F32).view(U32) * U32(2654435761)) >> U32(16)
    move = (mixed % U32(3)).astype(np.int32) - 1
    moved = (near.view(np.int32) + move).view(F32)
    # Whole powers of two are exact, and what is zero or not finite stays.
    keep = ~np.isfinite(near) | (np.abs(near) < 2 * F32(_NORMAL))
    keep |= (np.frexp(near)[0] == 0.5) & (exact == near)
    return np.where(keep, near, moved)


def ex2(x):
    x = flush(x)
    return flush(_blur(x, np.exp2(x.astype(F64))))


def lg2(x):
    x = flush(x)
    return _blur(x, np.log2(x.astype(F64)))


def rcp(x):
    x = flush(x)
    return flush(_blur(x, 1.0 / x.astype(F64)))


def rsqrt(x):
    x = flush(x)
    return _blur(x, 1.0 / np.sqrt(x.astype(F64)))


def rcp64(x):
    """The upper word of 1 / x, for Newton's steps to begin with."""
    return (np.atleast_1d(1.0 / x).view(U64) & U64(0xFFFFFFFF00000000)).view(F64)
