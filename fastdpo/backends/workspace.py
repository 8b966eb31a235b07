"""How large the pieces are: blocks of rows, columns of E that are kept, and how E lies in memory.

Everything here is a function of shapes, dtype and device alone. `budget` is `workspace_bytes`: what
may be kept between forward and backward, None for the default (`_default_budget`).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of E for one block of rows in the forward, and for one block of columns computed again in
# the backward.
_BLOCK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
_RECOMPUTE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_SUM_BYTES = 32 << 20  # of fp32 products on their way into a sum
# E computed again makes a step on a CPU longer by a sixth to a third, a 16-bit one on processors
# with AMX by far more: its operands have to be widened again (docs/design.md).
_DEFAULT_WORKSPACE = {"cpu": 128 << 20, "cuda": 2 << 30}
_DEFAULT_WORKSPACE_16_BIT = {"cpu": 512 << 20, "cuda": 2 << 30}
# A default that holds less than this part of E saves less than a quarter of it of one product in
# four: then no more is kept than a recomputed block needs anyway.
_WORTH_KEEPING = 0.25
_ROW_MULTIPLE = 64
_COLUMN_MULTIPLE = 512
# E's rows start on 128-byte boundaries, which bulk copies and matrix products like.
_ROW_ALIGNMENT_BYTES = 128


def columns_kept(n: int, vocab: int, x: Tensor, budget: int | None) -> int:
    """How many columns of E the workspace holds for n rows: all, or a multiple of
    _COLUMN_MULTIPLE.
    """
    budget = _default_budget(n, vocab, x) if budget is None else budget
    row_bytes = budget // max(1, n)
    if _padded(vocab, x) * x.element_size() <= row_bytes:
        return vocab
    return min(vocab, row_bytes // x.element_size()) // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE


def workspace_elements(
    n: int, vocab: int, x: Tensor, dtype: torch.dtype, budget: int | None
) -> int:
    """How many elements of `dtype` E may take for at most n rows."""
    budget = _largest_default(x, dtype) if budget is None else budget
    step = _ROW_ALIGNMENT_BYTES // dtype.itemsize
    return min(budget // dtype.itemsize, n * -(-vocab // step) * step)


def _default_budget(n: int, vocab: int, x: Tensor) -> int:
    budget = _largest_default(x, x.dtype)
    whole = n * _padded(vocab, x) * x.element_size()
    return budget if budget >= _WORTH_KEEPING * whole else _by_device(_RECOMPUTE_BYTES, x)


def _largest_default(x: Tensor, dtype: torch.dtype) -> int:
    return _by_device(_DEFAULT_WORKSPACE_16_BIT if dtype.itemsize == 2 else _DEFAULT_WORKSPACE, x)


def recompute_columns(n: int, vocab: int, x: Tensor) -> int:
    """Columns of E that are computed again at a time, where none are kept."""
    width = _by_device(_RECOMPUTE_BYTES, x) // max(1, n * x.element_size())
    return min(max(_COLUMN_MULTIPLE, width // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE), vocab)


def row_block(vocab: int, x: Tensor) -> int:
    """Rows of one forward block: a function of vocabulary, dtype and device alone."""
    rows = _by_device(_BLOCK_BYTES, x) // (max(1, vocab) * x.element_size())
    return max(_ROW_MULTIPLE, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)


def sum_rows(total: Tensor) -> int:
    """Rows of a product that are added to `total` [N, D] at a time."""
    return max(_ROW_MULTIPLE, _SUM_BYTES // (max(1, total.shape[1]) * total.element_size()))


def padded_empty(n: int, columns: int, x: Tensor) -> Tensor:
    """An uninitialised [n, columns] in x's dtype whose rows start on aligned addresses."""
    return cleared(padded_view(padded_storage(n, columns, x), n, columns))


def padded_storage(n: int, columns: int, x: Tensor) -> Tensor:
    """Flat, for `padded_view`."""
    return x.new_empty(n * _padded(columns, x))


def padded_view(flat: Tensor, n: int, columns: int) -> Tensor:  # [...] -> [n, columns]
    """`padded_empty` in memory that is there already."""
    stride = _padded(columns, flat)
    return flat[: n * stride].view(n, stride)[:, :columns]


def cleared(padded: Tensor) -> Tensor:  # [n, columns] -> [n, columns]
    """The same, with zeros between its rows.

    Matrix products that read whole vectors (oneDNN's bf16 does, for an odd number of columns)
    multiply what lies there by zero, and a NaN would survive that.
    """
    n, columns = padded.shape
    between = padded.stride(0) - columns
    padded.as_strided((n, between), padded.stride(), columns + padded.storage_offset()).zero_()
    return padded


def _padded(columns: int, x: Tensor) -> int:
    step = _ROW_ALIGNMENT_BYTES // x.element_size()
    return -(-columns // step) * step


def _by_device(table: dict[str, int], x: Tensor) -> int:
    return table["cuda" if x.is_cuda else "cpu"]
