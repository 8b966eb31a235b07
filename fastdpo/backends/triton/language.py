"""What the kernels share: exponentials, the head's transform of a logit, a dot, the order of tiles.

Every product followed by a sum is an explicit fma, and launches turn the compiler's own contraction
off: a sum must not change to the bit because the exponentials are also stored, or because a
statistic is asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

# The interpreter carries bf16 as 16-bit integers: its arithmetic needs a cast that compiled code
# must not have.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

_LOG2_E = tl.constexpr(1.4426950408889634)
_MINUS_2_LOG2_E = tl.constexpr(-2.8853900817779268)
_SIGN = tl.constexpr(-(2**31))  # the sign's bit of an fp32 number
_TANH_NEAR = tl.constexpr(0.55)  # |x| below which tanh is a polynomial


@triton.jit
def _power_of_two(x):
    if is_cuda() and not INTERPRETED:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        power = tl.exp2(x)
    return power


@triton.jit
def _reciprocal(x):
    """1 / x for x in [1, 2], to a unit in the last place."""
    if is_cuda() and not INTERPRETED:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def exponential(x):
    """e^x of an fp32 tile. On NVIDIA the hardware's own 2^x (2 ulp), results below 2^-126 flushed
    to zero.

    Keeping subnormal results costs a compare and two multiplications per element, half an epilogue,
    for probabilities below e^-87 of the anchor's.
    """
    if is_cuda() and not INTERPRETED:
        e = _power_of_two(x * _LOG2_E)
    else:
        e = tl.exp(x)
    return e


@triton.jit
def hyperbolic_tangent(x):
    """tanh of an fp32 tile, relative error below 5e-7, from one exponential and one reciprocal.

    |tanh| = 1 − 2q / (1 + q) with q = e^(−2|x|). That cancels near zero, where x + x³ · P(x²)
    with the minimax polynomial P takes over: 4e-8 and the roundings.
    """
    size = tl.abs(x)
    twice = _power_of_two(tl.fma(size, _MINUS_2_LOG2_E, 1.0))  # 2q
    far = tl.fma(-twice, _reciprocal(tl.fma(twice, 0.5, 1.0)), 1.0)
    square = x * x
    series = tl.fma(square, 0.01643758, -0.052671813)
    series = tl.fma(series, square, 0.13320725)
    series = tl.fma(series, square, -0.33332947)
    near = tl.fma(series * square, x, x)
    sign = x.to(tl.int32, bitcast=True) & _SIGN
    far = (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(size < _TANH_NEAR, near, far)


@triton.jit
def head_curve(
    u,  # fp32, any shape: hidden · weightᵀ + bias
    inner,  # gain without a softcap, scale / softcap with one
    outer,  # None without a softcap, softcap / temperature with one
):
    """t and factor, with z = t · factor the final logit."""
    t, factor = u, inner
    if outer is not None:
        t, factor = hyperbolic_tangent(u * inner), outer
    return t, factor


@triton.jit
def times_slope(
    e,  # fp32, any shape
    t,  # from `head_curve`
    outer,
):
    """e times the softcap's derivative 1 − t², which is 1 without one."""
    if outer is not None:
        e *= tl.fma(-t, t, 1.0)
    return e


@triton.jit
def multiply_add(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a [M, K] · b [K, N], products summed in fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile number -> (row tile, column tile), GROUP row tiles at a time.

    Programs that run together then share GROUP row tiles of hidden, which stay in L2, and a narrow
    strip of the weight, which is read from memory once per group of rows.
    """
    first = (tile // (GROUP * column_tiles)) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def product_tile(
    hidden_ptr,  # [N, D], rows contiguous
    weight_ptr,  # [V, D], any strides
    hidden_stride,
    weight_stride,
    weight_depth_stride,
    rows,  # [M]
    columns,  # [C]
    N,
    V,
    D,
    BLOCK_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden[rows] · weight[columns]ᵀ [M, C] in fp32, through plain pointers; 0 in columns beyond
    V.

    Rows beyond N repeat the last one (their results are never stored), which saves a mask per load.
    """
    depth = tl.arange(0, BLOCK_D)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    hidden = hidden_ptr + row[:, None] * hidden_stride + depth[None, :]
    weight = weight_ptr + columns.to(tl.int64)[None, :] * weight_stride
    weight += depth.to(tl.int64)[:, None] * weight_depth_stride
    products = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(hidden)
            if EVEN_V:
                b = tl.load(weight)
            else:
                b = tl.load(weight, mask=(columns < V)[None, :], other=0.0)
        else:
            inside = start + depth < D
            a = tl.load(hidden, mask=inside[None, :], other=0.0)
            b = tl.load(weight, mask=inside[:, None] & (columns < V)[None, :], other=0.0)
        products = multiply_add(a, b, products, PRECISION)
        hidden += BLOCK_D
        weight += BLOCK_D * weight_depth_stride
    return products
