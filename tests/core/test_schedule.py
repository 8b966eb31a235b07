"""The cost of a call, counted: how many [rows × V × D] products run, and what is allocated
(docs/design.md, "The schedule" and docs/design.md, "The workspace").
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.core import products
from fastdpo.loss import linear_dpo_loss, linear_logps

N, V, D = 96, 4096, 64
IGNORED = 32
UNIT = 2 * (N - IGNORED) * V * D
ELEMENT = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


# The products, and the position of their two factors among the arguments.
FACTORS = {
    **dict.fromkeys(("mm", "bmm", "linear", "mv"), 0),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addmv", "addmv_"), 1),
}


class CountProducts(TorchDispatchMode):
    """Counts the operations of every matrix product, in-place and out= forms included."""

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.products = 0
        self.dtypes: set[torch.dtype] = set()  # of the products' factors
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in FACTORS:
            self.products += 1
            a, b = args[FACTORS[name] :][:2]
            self.dtypes.add(a.dtype)
            self.operations += 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out

    @property
    def units(self):
        return self.operations / UNIT


def inputs(trained=(False, False, False), dtype=torch.float32):
    hidden = torch.randn(N, D).to(dtype).requires_grad_(trained[0])
    weight = torch.randn(V, D).to(dtype).requires_grad_(trained[1])
    bias = torch.randn(V).to(dtype).requires_grad_(trained[2])
    labels = torch.randint(0, V, (N,))
    labels[:IGNORED] = -100
    return hidden, weight, bias, labels


def units(trained, dtype=torch.float32, backward=True, **options):
    hidden, weight, bias, labels = inputs(trained, dtype)
    with CountProducts() as forward:
        logps = linear_logps(hidden, weight, labels, bias=bias, **options)
    with CountProducts() as back:
        if backward and any(trained):
            logps.sum().backward()
    for t, flag in zip((hidden, weight, bias), trained, strict=True):
        assert (t.grad is not None) == (flag and backward)
    return forward.units, back.units


EVERYTHING = None
HALF = (N - IGNORED) * (V // 2)  # elements


# The bias's own gradient is a product with one column: 1/D of a unit.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("trained", "workspace", "forward", "backward"),
    [
        ((False, False, False), EVERYTHING, 1, 0),
        ((True, False, False), EVERYTHING, 2, 0),
        ((True, False, False), 0, 2, 0),
        ((True, True, False), EVERYTHING, 1, 2),
        ((True, True, False), 0, 1, 3),
        ((True, True, False), HALF, 1, 2.5),
        ((False, True, False), EVERYTHING, 1, 1),
        ((False, True, False), 0, 1, 2),
        ((True, True, True), EVERYTHING, 1, 2 + 1 / D),
        ((False, False, True), EVERYTHING, 1, 1 / D),
        ((True, False, True), EVERYTHING, 1, 1 + 1 / D),
    ],
)
def test_units(dtype, trained, workspace, forward, backward):
    options = {} if workspace is None else {"workspace_bytes": workspace * ELEMENT[dtype]}
    assert units(trained, dtype, **options) == (forward, backward)


def test_columns_computed_again_are_one_tile_where_they_fit():
    """A tile is as wide as its rows leave room for, not as those of a whole block would."""
    hidden, weight, _, labels = inputs((True, True, False))
    logps = linear_logps(hidden, weight, labels, workspace_bytes=0)
    with CountProducts() as count:
        logps.sum().backward()
    assert count.products == 3  # E, and two gradients


@pytest.mark.parametrize("trained", [(True, True, False), (True, False, False)])
@pytest.mark.parametrize(
    ("dtype", "instructions", "products_in"),
    [
        (torch.bfloat16, True, (torch.float32, torch.bfloat16)),
        (torch.bfloat16, False, (torch.float32,)),
        (torch.float16, True, (torch.float32,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("workspace", [None, 0])
def test_what_16_bit_operands_are_multiplied_in(
    dtype, instructions, products_in, trained, workspace, monkeypatch
):
    """In fp32 where the processor has no instructions for them: PyTorch's product of them is slow
    there.
    """
    monkeypatch.setattr(products, "_has_bf16_products", lambda: instructions)
    hidden, weight, _, labels = inputs(trained, dtype)
    with CountProducts() as count:
        linear_logps(hidden, weight, labels, workspace_bytes=workspace).sum().backward()
    assert count.dtypes == set(products_in)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    linear_logps(*exact, labels).sum().backward()
    for t, e in zip((hidden, weight), exact, strict=True):
        if t.requires_grad:
            torch.testing.assert_close(t.grad.double(), e.grad, rtol=2e-2, atol=2e-2)


def test_fp16_computes_e_again():
    assert units((True, False, False), torch.float16) == (1, 2)
    assert units((True, True, False), torch.float16) == (1, 3)


def test_statistics_cost_no_product():
    hidden, weight, _, labels = inputs()
    with CountProducts() as count:
        linear_logps(hidden, weight, labels, stats=("entropy", "log_sum_sq_probs", "is_top1"))
    assert count.units == 1
    with CountProducts() as count:
        linear_logps(hidden, weight, labels, stats=("mean_logits",))
    assert count.units == pytest.approx(1, abs=1e-3)


def test_no_grad_is_one_unit():
    hidden, weight, _, labels = inputs((True, True, False))
    with torch.no_grad(), CountProducts() as count:
        linear_logps(hidden, weight, labels)
    assert count.units == 1


def test_a_dpo_step_is_three_units_and_one_for_the_reference():
    hidden, weight, _, labels = inputs((True, True, False))
    with CountProducts() as count:
        out = linear_dpo_loss(
            hidden.view(4, N // 4, D),
            weight,
            labels.view(4, N // 4),
            ref_hidden=hidden.detach().view(4, N // 4, D),
        )
        out.loss.backward()
    assert count.units == 4


@pytest.mark.parametrize(
    "trained", [(False, False, False), (True, True, False), (True, False, False)]
)
def test_nothing_of_the_logits_size_is_allocated(trained, monkeypatch):
    """With small blocks, no tensor is larger than the gradients, or a block."""
    from fastdpo.backends import torch as backend
    from fastdpo.backends import workspace

    block = 64 * V * 4
    monkeypatch.setitem(workspace._BLOCK_BYTES, "cpu", block // 2)
    monkeypatch.setitem(workspace._RECOMPUTE_BYTES, "cpu", block // 2)
    monkeypatch.setitem(backend._TILE_ELEMENTS, "cpu", 1 << 14)
    hidden = torch.randn(512, D).requires_grad_(trained[0])
    weight = torch.randn(V, D).requires_grad_(trained[1])
    labels = torch.randint(0, V, (512,))
    with CountProducts() as count:
        logps = linear_logps(hidden, weight, labels, workspace_bytes=0)
        if any(trained):
            logps.sum().backward()
    assert count.largest <= max(block, 512 * 512 * 4, weight.nbytes)
    assert count.largest < 512 * V * 4 / 4
