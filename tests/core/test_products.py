"""Products of 16-bit operands in fp32, a block at a time."""

from __future__ import annotations

import pytest
import torch

from fastdpo.backends import workspace
from fastdpo.core import linear, products


@pytest.fixture(params=[True, False], ids=["instructions", "none"])
def instructions(request, monkeypatch):
    monkeypatch.setattr(products, "_has_bf16_products", lambda: request.param)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(products, "_ROWS_WIDENED", 64)
    monkeypatch.setitem(workspace._RECOMPUTE_BYTES, "cpu", 0)  # 512 columns


def whole_numbers(*shape, dtype=torch.bfloat16):
    """Whose products and sums are exact in fp32."""
    return torch.randint(-8, 9, shape).to(dtype)


SHAPES = [(1, 1, 1), (64, 512, 3), (129, 1300, 33), (5, 2048, 700), (0, 4, 3), (3, 0, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_multiply_in_blocks(shape, dtype, instructions, small_blocks):
    m, k, n = shape
    a, b = whole_numbers(m, k, dtype=dtype), whole_numbers(k, n, dtype=dtype)
    want = a.float() @ b.float()
    assert torch.equal(products.multiply_wide(a, b), want)
    assert torch.equal(products.multiply(a, b).to(dtype), want.to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lift", [1.0, 2.0**43])
def test_multiply_into_in_blocks(shape, lift, instructions, small_blocks):
    """Also of a transposed factor, as E is."""
    m, k, n = shape
    a, b = whole_numbers(k, m).t(), whole_numbers(k, n)
    out = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    products.multiply_into(out, a, b, lift)
    assert torch.equal(out, ((a.float() @ b.float()) / lift).bfloat16())


def test_a_weight_in_fp32_has_its_gradient_made_in_place(monkeypatch):
    """Under autocast: nothing of its size is allocated beside it."""
    monkeypatch.setattr(products, "_has_bf16_products", lambda: False)
    monkeypatch.setattr(products, "_ROWS_WIDENED", 64)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("new_zeros", "mm"):
                made.append(out.numel())
            return out

    e, x = whole_numbers(32, 1000), whole_numbers(32, 24)
    into = torch.empty(1000, 24)
    with Watch():
        linear._weight_gradient(into, e, x, 1.0, None)
    assert torch.equal(into, e.float().t() @ x.float())
    assert max(made) <= 64 * 24


def test_no_operand_is_widened_whole(small_blocks):
    """Of a [M, K] or b [K, N]: 512 of K at a time."""
    taken = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "_to_copy":
                taken.append(out.numel())
            return out

    a, b = whole_numbers(40, 5000), whole_numbers(5000, 24)
    with Watch():
        products.multiply_wide(a, b)
    assert max(taken) == 40 * 512
