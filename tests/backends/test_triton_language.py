"""What the Triton kernels share: the tanh they write themselves, and the order of their tiles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastdpo.backends.triton.language import (
    _TANH_NEAR,
    exponential,
    hyperbolic_tangent,
    tile_position,
    times_slope,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.filterwarnings("ignore::RuntimeWarning")
]


@triton.jit
def curves(x_ptr, tanh_ptr, slope_ptr, exp_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    t = hyperbolic_tangent(x)
    tl.store(tanh_ptr + place, t)
    tl.store(slope_ptr + place, times_slope(tl.full((BLOCK,), 1.0, tl.float32), t, 1.0))
    tl.store(exp_ptr + place, exponential(x))


@triton.jit
def positions(row_ptr, column_ptr, row_tiles, column_tiles, GROUP: tl.constexpr):
    tile = tl.program_id(0)
    row, column = tile_position(tile, row_tiles, column_tiles, GROUP)
    tl.store(row_ptr + tile, row)
    tl.store(column_ptr + tile, column)


def evaluate(x):
    outputs = [torch.empty_like(x) for _ in range(3)]
    curves[(1,)](x, *outputs, BLOCK=x.numel(), enable_fp_fusion=False)
    return outputs


def magnitudes(low, high, count=4096):
    """Numbers of both signs, evenly spread over the exponents."""
    sizes = torch.logspace(low, high, count // 2, dtype=torch.float64)
    return torch.cat([sizes, -sizes]).float().to(DEVICE)


def test_tanh():
    seam = _TANH_NEAR.value
    near_the_seam = torch.linspace(seam - 0.01, seam + 0.01, 4096, device=DEVICE)
    for x in (magnitudes(-30, 1.4), near_the_seam, -near_the_seam):
        tanh, slope, _ = evaluate(x)
        expected = x.double().tanh()
        assert ((tanh - expected).abs() <= 1e-6 * expected.abs()).all()
        assert tanh.abs().max() <= 1.0
        # 1 − t²: absolute, as eager's is.
        assert ((slope - (1 - expected**2)).abs() <= 5e-7).all()
        assert slope.min() >= 0.0


def test_tanh_at_the_ends():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e30, -1e30, 1e-40], device=DEVICE)
    tanh, slope, _ = evaluate(x)
    assert tanh[:4].tolist() == [0.0, 0.0, 1.0, -1.0]
    assert tanh[4].isnan()
    assert tanh[5:7].tolist() == [1.0, -1.0]
    assert 0.0 <= tanh[7] <= 1e-40
    assert slope[[0, 2, 3]].tolist() == [1.0, 0.0, 0.0]


def test_exponential():
    x = torch.cat([magnitudes(-6, 1.9, 2048), torch.linspace(-87.0, 88.0, 2048, device=DEVICE)])
    _, _, e = evaluate(x)
    # x · log₂e is rounded before the power is taken, so the error grows with x.
    allowed = (2.0**-22 + x.double().abs() * 2.0**-23) * x.double().exp()
    assert ((e - x.double().exp()).abs() <= allowed).all()
    ends = torch.tensor([float("-inf"), float("inf"), float("nan"), -1e4], device=DEVICE)
    assert evaluate(ends)[2].nan_to_num(7.0, posinf=8.0).tolist() == [0.0, 8.0, 7.0, 0.0]


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (16, 3), (33, 2)])
def test_every_tile_is_visited_once_a_group_at_a_time(rows, columns, group):
    row, column = torch.full((2, rows * columns), -1, dtype=torch.int32, device=DEVICE)
    positions[(rows * columns,)](row, column, rows, columns, GROUP=group)
    visited = list(zip(row.tolist(), column.tolist(), strict=True))
    assert sorted(visited) == [(r, c) for r in range(rows) for c in range(columns)]
    of_group = [r // group for r, _ in visited]
    assert of_group == sorted(of_group), "a group is finished before the next begins"
    assert visited == sorted(visited, key=lambda at: (at[0] // group, at[1], at[0]))
