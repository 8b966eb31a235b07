"""From a tile of products to exponentials and their sums, in registers (docs/design.md, "The
epilogue").

    d_tv = z_tv − anchor_t        e_tv = exp(d_tv) for v ≠ y_t, else 0        E_tv = e_tv · slope_tv

Per element without statistics: one fma, a compare and a select, a multiplication, an exponential,
an addition, and half a conversion where E is stored. The label's own entry of E is not this code's
business: one scattered store per row, after the sums are known (`reduce_sums`), is cheaper than a
select per entry.

A tile is taken in CHUNKS of columns, one after the other, so that e, d and the slope are alive for
a part of it only. Each chunk is a branch of its own, taken wherever there is something to compute:
within straight code the assembler starts all chunks' exponentials before it ends the first, and
runs out of registers. Whatever is asked for, the chunks and the order of the sums are the same.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..contract import COLLISION_SHIFT
from .language import exponential, head_curve, times_slope

_NO_LOGIT = tl.constexpr(float("-inf"))
_LEAST = tl.constexpr(-3.4028234663852886e38)
_COLLISION_FACTOR = tl.constexpr(math.exp(COLLISION_SHIFT))


@triton.jit
def column_chunks(x, CHUNKS: tl.constexpr):
    """x [M, N] as a tuple of CHUNKS tiles of neighbouring columns, without moving a register."""
    chunks = (x,)
    if CHUNKS > 1:
        pairs = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
        chunks = column_chunks(left, CHUNKS // 2) + column_chunks(right, CHUNKS // 2)
    return chunks


@triton.jit
def exponentials(
    products,  # [M, N] fp32: hidden · weightᵀ, 0 beyond the vocabulary
    bias_ptr,  # [V] or None
    anchor,  # [M] fp32
    label,  # [M]
    columns,  # [N]
    vocab_size,
    inner,
    outer,
    EVEN_V: tl.constexpr,
):
    """(e, d, t, factor) with z = t · factor; e = 0, d = −inf in the label's column and beyond the
    vocabulary.
    """
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < vocab_size, other=0.0)
        products += bias.to(tl.float32)[None, :]
    t, factor = head_curve(products, inner, outer)
    counts = columns[None, :] != label[:, None]
    if not EVEN_V:
        counts = counts & (columns < vocab_size)[None, :]
    shifted = tl.where(counts, tl.fma(t, factor, -anchor[:, None]), _NO_LOGIT)
    return exponential(shifted), shifted, t, factor


@triton.jit
def no_sums(M: tl.constexpr):
    """The five sums of `ExpSums`, each [M], before the first column; those not asked for stay as
    they are.
    """
    zero = tl.zeros((M,), tl.float32)
    return zero, zero, zero, zero, tl.full((M,), _NO_LOGIT, tl.float32)


@triton.jit
def add_sums(
    sums,  # five times [M]
    e,  # [M, N]
    shifted,  # [M, N]
    t,  # [M, N]
    factor,
    anchor,  # [M]
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    LOGITS: tl.constexpr,
    TOP: tl.constexpr,
):
    """The sums with these columns added. Here Σ z includes the label, which `reduce_sums` takes
    away.
    """
    total, entropy, collision, logits, top = sums
    total += tl.sum(e, 1)
    if ENTROPY:
        # 0 · −inf is nothing, not NaN: entries that cannot occur have no entropy.
        entropy += tl.sum(e * tl.maximum(shifted, _LEAST), 1)
    if COLLISION:
        scaled = e * _COLLISION_FACTOR
        collision += tl.sum(scaled * scaled, 1)
    if LOGITS:
        logits += tl.sum(t, 1) * factor
    if TOP:
        top = tl.maximum(top, tl.max(shifted, 1) + anchor)
    return total, entropy, collision, logits, top


@triton.jit
def tile_epilogue(
    products,  # [M, BLOCK_V] fp32
    bias_ptr,  # [V] or None
    out,  # E: a descriptor of blocks [M, BLOCK_V / CHUNKS], a pointer, or None
    out_stride,  # of a pointer
    K,  # E's columns, behind a pointer
    anchor,  # [M] fp32
    label,  # [M]
    rows,  # [M]
    mask,  # [M]: the rows that are stored, behind a pointer
    first_row,
    first_column,
    V,
    inner,
    outer,
    DESCRIPTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    LOGITS: tl.constexpr,
    TOP: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """The sums of one tile, five times [M], and its part of E, if asked for, on its way."""
    CHUNK: tl.constexpr = products.shape[1] // CHUNKS
    sums = no_sums(products.shape[0])
    chunks = column_chunks(products, CHUNKS)
    for c in tl.static_range(CHUNKS):
        start = first_column + c * CHUNK
        # No branch around a whole tile: Triton 3.6 cannot compile one on sm_100.
        if CHUNKS == 1 or start < V:
            columns = start + tl.arange(0, CHUNK)
            e, shifted, t, factor = exponentials(
                chunks[c], bias_ptr, anchor, label, columns, V, inner, outer, EVEN_V
            )
            sums = add_sums(sums, e, shifted, t, factor, anchor, ENTROPY, COLLISION, LOGITS, TOP)
            if out is not None:
                if DESCRIPTOR:
                    out.store([first_row, start], times_slope(e, t, outer).to(out.dtype))
                else:
                    place = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
                    stored = times_slope(e, t, outer).to(out.dtype.element_ty)
                    tl.store(place, stored, mask=mask[:, None] & (columns < K)[None, :])
    return sums


@triton.jit
def store_sums(
    here,  # [M] pointers: this vocabulary tile's place for the first quantity
    quantity_stride,
    mask,  # [M]
    sums,  # five times [M]
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    LOGITS: tl.constexpr,
    TOP: tl.constexpr,
):
    """One fp32 number per row and quantity asked for, in the order of `ExpSums`."""
    total, entropy, collision, logits, top = sums
    tl.store(here, total, mask=mask)
    if ENTROPY:
        here += quantity_stride
        tl.store(here, entropy, mask=mask)
    if COLLISION:
        here += quantity_stride
        tl.store(here, collision, mask=mask)
    if LOGITS:
        here += quantity_stride
        tl.store(here, logits, mask=mask)
    if TOP:
        here += quantity_stride
        tl.store(here, top, mask=mask)
