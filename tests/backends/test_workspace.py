"""How much of E is kept: by default what is worth it, and never more than there is room for."""

from __future__ import annotations

import pytest
import torch

from fastdpo.backends import workspace

MIB = 1 << 20
LIKE = {dtype: torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}


def kept_bytes(n, vocab, x, budget=None):
    columns = workspace.columns_kept(n, vocab, x, budget)
    return n * workspace._padded(columns, x) * x.element_size()


@pytest.mark.parametrize(
    ("dtype", "tokens", "vocab", "most", "all_of_it"),
    [
        (torch.float32, 64, 32_000, 8 * MIB, True),
        (torch.float32, 1024, 128_256, 128 * MIB, False),
        (torch.float32, 2048, 128_256, 32 * MIB, False),  # 128 MiB would be an eighth of E
        (torch.bfloat16, 1024, 128_256, 512 * MIB, True),
        (torch.bfloat16, 65_536, 128_256, 32 * MIB, False),
    ],
)
def test_the_default(dtype, tokens, vocab, most, all_of_it):
    x = LIKE[dtype]
    assert kept_bytes(tokens, vocab, x) <= most
    columns = workspace.columns_kept(tokens, vocab, x, None)
    assert (columns == vocab) == all_of_it
    assert columns or most < tokens * workspace._COLUMN_MULTIPLE * x.element_size()


@pytest.mark.parametrize("budget", [None, 0, 10_000, 50 * MIB])
@pytest.mark.parametrize("dtype", LIKE)
def test_a_compiled_step_has_room_for_any_number_of_rows(dtype, budget):
    """Its workspace is allocated before the rows are counted."""
    x, total, vocab = LIKE[dtype], 3000, 50_257
    room = workspace.workspace_elements(total, vocab, x, dtype, budget) * x.element_size()
    for n in (1, 7, 500, 999, 2048, total):
        assert kept_bytes(n, vocab, x, budget) <= room


@pytest.mark.parametrize("n", [1, 100, 3000, 65_536])
@pytest.mark.parametrize("dtype", LIKE)
def test_columns_computed_again_are_whole_tiles(dtype, n):
    """Tiles' columns divide 512: only the vocabulary's last block then needs a mask."""
    x, vocab = LIKE[dtype], 50_257
    columns = workspace.recompute_columns(n, vocab, x)
    assert columns == vocab or columns % 512 == 0
    assert 0 < columns <= vocab
    assert columns == 512 or n * columns * x.element_size() <= 32 * MIB
    assert workspace.recompute_columns(n, 300, x) == 300
