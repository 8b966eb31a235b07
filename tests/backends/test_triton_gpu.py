"""The Triton backend on a GPU: what the interpreter cannot show.

On a GPU the other test_triton_* files run compiled, too, and carry the mark as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_linear_logps import check, make
from test_triton_primitives import STATS, everything, inputs, same_bits
from torch import nn

from fastdpo.backends.contract import Head
from fastdpo.loss import linear_dpo_loss, linear_logps

triton = pytest.importorskip("fastdpo.backends.triton")

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = (32_000, 128_256, 151_936, 256_000, 50_257)
BIG = 17_000  # rows of 128,256 logits: more than 2^31


@pytest.fixture(autouse=True)
def _runs_here():
    ok, why = triton.available()
    if not ok:
        pytest.skip(f"the Triton backend cannot run: {why}")


def free(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free device memory")


def on_device(tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def pairs(dtype, sequences=4, length=64, d=256, vocab=32_000, trained=True):
    hidden = torch.randn(sequences, length, d, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, d, device=DEVICE)).to(dtype).requires_grad_(trained)
    labels = torch.randint(vocab, (sequences, length), device=DEVICE)
    labels[:, : length // 3] = -100
    return hidden, weight, labels


# ---- The accuracy rule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_real_vocabularies(vocab, dtype):
    free(8)
    hidden, weight, _, labels = on_device(make(200, vocab, 256, dtype, spread=0.1))
    upstream = torch.linspace(-1, 2, 200, device=DEVICE)
    for head, workspace in (({}, None), ({"softcap": 30.0}, 0)):
        check(
            hidden, weight, None, labels, upstream=upstream, head=head, backend="triton",
            workspace_bytes=workspace,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["zero", "expanded", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradients(dtype, kind):
    hidden, weight, bias, labels = on_device(make(100, 5000, 64, dtype, bias=True))
    upstream = {
        "zero": torch.zeros(100, device=DEVICE),
        "expanded": torch.tensor(0.5, device=DEVICE).expand(100),
        "strided": torch.randn(200, device=DEVICE)[::2],
    }[kind]
    for trained in ((True, True, True), (True, False, False)):
        check(hidden, weight, bias, labels, trained, upstream, backend="triton")


def test_fp32_is_multiplied_as_pytorch_says():
    hidden, weight, _, labels = on_device(make(64, 4000, 1024, torch.float32, ignored=0.0))
    exact = linear_logps(hidden.double(), weight.double(), labels, backend="torch")
    errors = {}
    for precision in ("highest", "high"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            logps = linear_logps(hidden, weight, labels, backend="triton")
        finally:
            torch.set_float32_matmul_precision(before)
        errors[precision] = float((logps - exact).abs().max())
    assert errors["highest"] < 1e-4
    if torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None:
        assert 1e-4 < errors["high"] < 0.2


# ---- The same bits


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype, softcap):
    """Few rows take another tile than many: not one bit may tell."""
    hidden, head, labels = inputs(dtype, n=300, v=5000, d=512, spread=2.0, softcap=softcap)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[77] = -400.0
    whole = everything(hidden, head, labels, anchor)
    for rows in (slice(77, 78), slice(0, 64), slice(64, 129), slice(235, 300)):
        for a, b in zip(whole, everything(hidden, head, labels, anchor, rows), strict=True):
            same_bits(a[rows], b)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_do_not_depend_on_what_else_is_asked(dtype, softcap):
    hidden, head, labels = inputs(dtype, n=200, v=5003, d=512, spread=2.0, softcap=softcap)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[5] = -400.0
    anchors, sums, *_, out = everything(hidden, head, labels, anchor)
    for stats in ((), STATS[:1], STATS[1:]):
        for store in (True, False):
            found = everything(hidden, head, labels, anchor, stats=stats, store=store)
            same_bits(anchors, found[0])
            same_bits(sums, found[1])
            if store:
                same_bits(out, found[-1])


@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_runs_give_the_same_bits(dtype, workspace):
    hidden, weight, labels = pairs(dtype)

    def run():
        out = linear_dpo_loss(
            hidden, weight, labels, ref_hidden=hidden.detach() * 0.9, backend="triton",
            workspace_bytes=workspace,
        )  # fmt: skip
        return [out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))]

    first = run()
    for _ in range(9):
        for a, b in zip(first, run(), strict=True):
            same_bits(a.reshape(-1), b.reshape(-1))


# ---- Memory


def extra_bytes(function):
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def test_the_reference_keeps_next_to_nothing():
    free(4)
    hidden, weight, _ = pairs(torch.bfloat16, 8, 1024, 512, 128_256, trained=False)
    labels = torch.randint(128_256, (8, 1024), device=DEVICE)

    def reference():
        with torch.no_grad():
            linear_logps(hidden, weight, labels, backend="triton")

    rows, tiles = 8192, -(-128_256 // 128)
    # Partial sums of one block of rows at most, a copy of hidden, and numbers per row.
    assert extra_bytes(reference) < 4 * rows * tiles + 2 * hidden.nbytes + 256 * rows


@pytest.mark.parametrize("workspace", [0, 256 << 20])
def test_a_step_keeps_to_its_workspace(workspace):
    free(8)
    hidden, weight, labels = pairs(torch.bfloat16, 8, 1024, 512, 128_256)

    def step():
        loss = linear_dpo_loss(hidden, weight, labels, backend="triton", workspace_bytes=workspace)
        torch.autograd.grad(loss.loss, (hidden, weight))

    gradients = weight.nbytes + 4 * hidden.nbytes
    blocks = 256 << 20  # of columns computed again
    eager = 8 * 1024 * 2 // 3 * 128_256 * 4
    extra = extra_bytes(step)
    assert extra < workspace + blocks + gradients + (96 << 20)
    assert extra < eager / 2


# ---- Nothing waits


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_device(dtype, trained):
    """Given the rows, neither a step nor a row whose label is very unlikely reads the device."""
    hidden, weight, labels = pairs(dtype, trained=trained)
    bias = torch.zeros(weight.shape[0], device=DEVICE, dtype=dtype)
    bias[labels[0, -1]] = -300.0
    index = (labels.flatten() != -100).nonzero().squeeze(1)
    ref = torch.zeros(4, device=DEVICE)

    def step():
        out = linear_dpo_loss(
            hidden, weight, labels, bias=bias, ref_logps=ref, row_index=index, backend="triton",
            stats=("entropy",),
        )  # fmt: skip
        return torch.autograd.grad(out.loss, (hidden, weight) if trained else hidden)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(g.isfinite().all() for g in gradients)


def test_the_current_stream_and_a_graph():
    hidden, head, labels = inputs(torch.bfloat16, n=100, v=3000, d=128)
    anchor = triton.target_logits(hidden, head, labels)
    expected = everything(hidden, head, labels, anchor)
    static = torch.zeros_like(hidden)
    everything(static, head, labels, anchor)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails where a kernel goes to any other stream
        captured = everything(static, head, labels, anchor)
    static.copy_(hidden)
    graph.replay()
    for a, b in zip(expected, captured, strict=True):
        same_bits(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current():
    hidden, head, labels = inputs(torch.bfloat16)
    there = torch.device("cuda:1")
    moved = Head(head.weight.to(there))
    a = triton.target_logits(hidden, head, labels)
    with torch.cuda.device(0):
        b = triton.target_logits(hidden.to(there), moved, labels.to(there))
        sums = triton.exp_logits(hidden.to(there), moved, labels.to(there), b)
        assert torch.cuda.current_device() == 0
    same_bits(a, b.to(a.device))
    same_bits(triton.exp_logits(hidden, head, labels, a).sum, sums.sum.to(a.device))


# ---- Beyond 2^31 elements


def test_e_beyond_two_to_the_31_elements():
    free(12)
    vocab = 128_256
    hidden = torch.randn(BIG, 64, device=DEVICE).bfloat16()
    head = Head((0.1 * torch.randn(vocab, 64, device=DEVICE)).bfloat16())
    labels = torch.randint(vocab, (BIG,), device=DEVICE)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[BIG - 2] = -500.0
    out = torch.empty(BIG, vocab, device=DEVICE, dtype=torch.bfloat16)
    sums = triton.exp_logits(hidden, head, labels, anchor, out=out)
    last = slice(BIG - 130, BIG)
    part = torch.empty(130, vocab, device=DEVICE, dtype=torch.bfloat16)
    again = triton.exp_logits(hidden[last], head, labels[last], anchor[last], out=part)
    same_bits(out[last], part)
    same_bits(sums.sum[last], again.sum)
    same_bits(sums.anchor[last], again.anchor)


def test_logits_beyond_two_to_the_31_elements():
    free(12)
    logits = torch.empty(BIG, 128_256, dtype=torch.bfloat16, device=DEVICE).normal_()
    labels = torch.full((BIG,), -1, device=DEVICE)
    last = slice(BIG - 3, BIG)
    labels[last] = torch.tensor([0, 5, 128_255], device=DEVICE)
    tail = logits[last].clone()
    logps, lse = triton.logits_logps(logits, labels, Head(logits))
    expected = triton.logits_logps(tail, labels[last], Head(tail))
    same_bits(expected[0], logps[last])
    same_bits(expected[1], lse[last])
    grad = torch.ones(BIG, device=DEVICE)
    triton.logits_logps_backward(grad, logits, labels, lse, Head(logits), logits)
    triton.logits_logps_backward(grad[last], tail, labels[last], lse[last], Head(tail), tail)
    same_bits(tail, logits[last])
    assert not logits[: BIG - 3].any()


# ---- torch.compile


@pytest.mark.parametrize("trained", [True, False])
def test_a_step_compiles_whole(trained):
    hidden, weight, labels = pairs(torch.bfloat16, trained=trained)
    layer = nn.Linear(256, 256, device=DEVICE, dtype=torch.bfloat16)

    def step(hidden, labels):
        return linear_dpo_loss(
            torch.tanh(layer(hidden)), weight, labels, ref_hidden=hidden, backend="triton"
        ).loss

    def run(function):
        loss = function(hidden.detach(), labels)
        parameters = [layer.weight, *([weight] if trained else [])]
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    torch._dynamo.reset()
    for a, b in zip(run(step), run(torch.compile(step, fullgraph=True)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


# ---- compute-sanitizer

SANITIZED = """
import torch
from test_triton_primitives import DTYPES, STATS, everything, inputs
from fastdpo.backends import triton
from fastdpo.backends.contract import Head
for dtype in DTYPES:
    for n, v, d, softcap in ((1, 300, 47, None), (70, 515, 64, 9.0)):
        hidden, head, labels = inputs(dtype, n=n, v=v, d=d, softcap=softcap)
        anchor = triton.target_logits(hidden, head, labels)
        anchor[0] = -400.0
        everything(hidden, head, labels, anchor)
        logits = torch.randn(n, 9000, device="cuda").to(dtype)
        logps, lse = triton.logits_logps(logits, labels, Head(logits))
        triton.logits_logps_backward(logps, logits, labels, lse, Head(logits), logits)
offsets = torch.tensor([0, 2, 70], device="cuda")
triton.sequence_loss(torch.zeros(70, device="cuda"), offsets, offsets[:2].float(), 0.1, 0.0,
                     True, "interleaved")
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH")
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # or an overrun lands in the same block
            "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
