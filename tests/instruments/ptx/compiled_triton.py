"""The Triton kernels' PTX on the CPU, held to the fp64 oracle: run by `test_ptx_triton.py` in a
process in which Triton does not interpret, once per architecture.
"""

from __future__ import annotations

import dataclasses
import math

import cases
import pytest
import test_triton_primitives as primitives
import torch
from test_triton_primitives import STATS, check, inputs, oracle, same_bits, triton

from benchmarks.instruments.ahead_of_time import _matmul_precision
from benchmarks.instruments.ptx.faults import Divergence, Race, Uninitialised
from fastdpo.backends.triton.launch import Target

bf16, f32 = torch.bfloat16, torch.float32


@pytest.fixture
def hopper(executor):
    if executor.target.arch != "sm_90":
        pytest.skip("only Hopper's kernel")
    return executor


def exp_logits(dtype, *shape, **options):
    head_options = options.pop("head", {})
    hidden, head, labels = inputs(dtype, *shape, **head_options)
    anchor = oracle.target_logits(hidden.float(), head_of(head, f32), labels)
    return check(hidden, head, labels, anchor, **options)


def head_of(head, dtype):
    bias = None if head.bias is None else head.bias.to(dtype)
    return type(head)(head.weight.to(dtype), bias, head.scale, head.softcap, head.temperature)


@pytest.mark.parametrize("head", [pytest.param("plain", marks=pytest.mark.slow), "everything"])
def test_exp_logits(executor, head):
    before = len(executor.launched)
    exp_logits(bf16, pad=20, head=primitives.HEADS[head])
    main = "exp_logits_tma" if executor.target.arch == "sm_90" else "exp_logits_pointers"
    assert main in executor.launched[before:]


@pytest.mark.slow
def test_exp_logits_in_fp32_and_fp16():
    exp_logits(f32)
    exp_logits(torch.float16, out_dtype=f32, stats=())


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "depth"), [(20, 72), (70, 72), (20, 74)])
def test_tf32(executor, rows, depth):
    """Ten bits of mantissa are enough for small integers."""
    hidden, weight = (torch.randint(-3, 4, (n, depth)).float() for n in (rows, 300))
    head, labels = primitives.Head(weight, None, 0.05), torch.randint(0, 300, (rows,))
    anchor = triton.target_logits(hidden, head, labels)
    anchor[3] = -300.0
    before = len(executor.launched)
    with _matmul_precision("tf32"):
        check(hidden, head, labels, anchor, stats=("entropy",))
    descriptors = executor.target.arch == "sm_90" and depth % 4 == 0
    main = "exp_logits_tma" if descriptors else "exp_logits_pointers"
    assert main in executor.launched[before:]


def test_several_tiles_a_program(executor, monkeypatch):
    """The loop over tiles and that over D, longer than the pipeline is deep."""
    monkeypatch.setattr(executor, "target", Target(executor.target.arch, 1))
    exp_logits(bf16, 40, 600, 400, stats=("entropy",), head={"bias": True})


@pytest.mark.slow
def test_rows_that_descriptors_cannot_address():
    exp_logits(bf16, 17, 200, 47, stats=())


@pytest.mark.slow
def test_more_rows_than_one_tile():
    exp_logits(bf16, 150, 260, 72, stats=())


def test_flagged_rows(executor):
    hidden, head, labels = inputs(bf16, bias=True)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[[0, 7, 19]] = -300.0
    got, _ = check(hidden, head, labels, anchor)
    assert got.sum.isfinite().all()
    assert (got.anchor[[0, 7, 19]] > -100).all()


@pytest.mark.slow
def test_fewer_columns_kept_and_a_fixed_anchor():
    entry = -torch.rand(primitives.N)
    exp_logits(bf16, k=100, pad=28, entry=entry, fixed=True, stats=())


@pytest.mark.slow
def test_any_order_of_blocks_and_arrivals_gives_the_same_bits(executor):
    hidden, head, labels = inputs(bf16, 40, 600, 200, softcap=20.0)
    anchor = torch.randn(40)

    def run():
        out = torch.empty(40, 640, dtype=bf16)[:, :600]
        sums = triton.exp_logits(hidden, head, labels, anchor, out=out, stats=STATS[:1])
        return [sums.anchor, sums.sum, sums.entropy, out]

    in_order = run()
    for seed in (1, 2):
        with executor.schedule(seed):
            for a, b in zip(in_order, run(), strict=True):
                same_bits(a, b)


@pytest.mark.parametrize("dtype", [bf16, pytest.param(f32, marks=pytest.mark.slow)], ids=str)
def test_logits_logps_and_its_gradient(dtype):
    for vocab, offset in ((50, 0), (5003, 1)):
        logits, labels = cases.logits_and_labels(dtype, 3, vocab, ignored=(1,), offset=offset)
        for transform in ({}, {"scale": 1.5, "softcap": 20.0, "temperature": 1.3}):
            cases.check_forward(triton, logits, labels, **transform)
        check_backward(logits, labels, torch.full_like(logits, math.nan))
    check_backward(logits, labels, logits)


def check_backward(logits, labels, out) -> None:
    h = cases.head(logits, softcap=20.0)
    grad, rows = torch.randn(labels.shape), labels >= 0
    exact = torch.empty_like(logits[rows], dtype=torch.float64)
    wide = logits[rows].double()
    _, lse = triton.logits_logps(logits, labels, h)
    exact_lse = oracle.logits_logps(wide, labels[rows], h)[1]
    oracle.logits_logps_backward(grad[rows].double(), wide, labels[rows], exact_lse, h, exact)
    triton.logits_logps_backward(grad, logits, labels, lse, h, out)
    assert (out[~rows] == 0).all()
    torch.testing.assert_close(out[rows], exact.to(out.dtype))


@pytest.mark.parametrize(
    "pairs", [pytest.param("concatenated", marks=pytest.mark.slow), "interleaved"]
)
def test_sequence_loss(pairs):
    logps, offsets, ref = cases.sequences([300, 41, 0, 3, 1, 70])
    options = (0.1, 0.1, True, pairs)
    ours = triton.sequence_loss(logps, offsets, ref, *options)
    exact = oracle.sequence_loss(logps.double(), offsets, ref.double(), *options)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-7)


def test_offsets_beyond_two_to_the_31_elements():
    logits = cases.far_apart(torch.randn(2, 100).to(bf16), (1 << 31) + 24)
    labels = torch.tensor([3, 99])
    cases.check_forward(triton, logits, labels)
    check_backward(logits, labels, logits)


@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 1])
def test_rows_of_a_product_beyond_two_to_the_31_elements(odd):
    hidden, head, labels = inputs(bf16)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[3] = -300.0
    results = []
    for strides in (
        (48, 48, 304),
        ((1 << 28) + odd, 48, 304),
        (48, (1 << 24) + odd, 304),
        (48, 48, (1 << 28) + odd),
    ):
        x = cases.far_apart(hidden, strides[0])
        weight = cases.far_apart(head.weight, strides[1])
        out = cases.far_apart(torch.zeros(primitives.N, primitives.V, dtype=bf16), strides[2])
        sums = triton.exp_logits(x, primitives.Head(weight), labels, anchor, out=out)
        results.append((sums.sum, out.contiguous()))
    for got in results[1:]:
        torch.testing.assert_close(got[0], results[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(got[1], results[0][1], rtol=2**-7, atol=1e-30)


# ---- That these checks can fail: kernels broken on purpose


def without(text: str, nth: int | None, after: int = 0):
    """A kernel that lacks the nth of the instructions that contain this, or one after it, or all
    of them.
    """

    def alter(kernel):
        changed = list(kernel.instructions)
        places = [n + after for n, i in enumerate(changed) if text in i.text]
        nothing = {"opcode": "membar.gl", "operands": [], "guard": None}
        for place in places if nth is None else [places[nth]]:
            changed[place] = dataclasses.replace(changed[place], **nothing)
        return dataclasses.replace(kernel, instructions=changed)

    return alter


def broken(executor, monkeypatch, kernel: str, alter) -> None:
    monkeypatch.setitem(executor.alterations, kernel, alter)
    monkeypatch.setattr(executor, "target", Target(executor.target.arch, 1))
    exp_logits(bf16, 40, 600, 400, stats=("entropy",), head={"bias": True})


@pytest.mark.parametrize(
    ("opcode", "nth", "fault", "words"),
    [
        ("mbarrier.try_wait", 0, Race, "read of a copy's target"),
        ("fence.proxy.async", 0, Race, "without a fence"),
        ("cp.async.bulk.wait_group.read", 1, Race, "write to a copy's source"),
        ("cp.async.bulk.wait_group", -1, Race, "ends while copies"),
        ("wgmma.wait_group.sync.aligned 1", 0, Race, "write to a copy's source"),
        ("wgmma.wait_group.sync.aligned 0", 0, AssertionError, ""),
        ("cp.async.bulk.tensor.2d.shared", 6, Divergence, "wait for ever"),
        ("mbarrier.init", 1, Uninitialised, "arrive"),
        ("stmatrix", 0, Uninitialised, "read"),
    ],
)
def test_a_broken_kernel_is_noticed_on_hopper(hopper, monkeypatch, opcode, nth, fault, words):
    with pytest.raises(fault, match=words):
        broken(hopper, monkeypatch, "exp_logits_tma", without(opcode, nth))


def test_a_barrier_before_a_store_by_hardware_is_missed(hopper, monkeypatch):
    alter = without("fence.proxy.async", 0, after=1)
    with pytest.raises(Race, match=r"read beside a write|without a fence"):
        broken(hopper, monkeypatch, "exp_logits_tma", alter)


@pytest.mark.parametrize(
    ("opcode", "nth", "fault", "words"),
    [
        ("cp.async.wait_group", 0, Race, "read of a copy's target"),
        ("bar.sync", None, Race, "beside"),
        ("cp.async.cg", 0, Uninitialised, "read"),
        ("mma.sync", 0, AssertionError, ""),
    ],
)
def test_a_broken_kernel_is_noticed(executor, monkeypatch, opcode, nth, fault, words):
    if executor.target.arch != "sm_80":
        pytest.skip("the kernel of pointers on Ampere")
    with pytest.raises(fault, match=words):
        broken(executor, monkeypatch, "exp_logits_pointers", without(opcode, nth))
