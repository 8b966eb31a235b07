"""The CUDA C++ backend on a GPU: the CPU's checks again, and what only a GPU can show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from public_cases import check_logits_dpo_loss

from fastdpo.backends import cuda

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PAIRS = ("concatenated", "interleaved")
# The last column of blocks is ragged, or whole; the rows are aligned to 16 bytes, or not.
VOCABULARIES = (1, 9, 1000, 4099, 32000, 50257, 128256, 151936, 256000)


@pytest.fixture(autouse=True)
def _runs_here():
    ok, why = cuda.available()
    if not ok:
        pytest.skip(f"the CUDA C++ backend cannot run: {why}")


@pytest.mark.parametrize("transform", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_logits_there_and_back(vocab, dtype, transform):
    logits, labels = cases.logits_and_labels(dtype, 9, vocab, ignored=(1, 8), device=DEVICE)
    cases.check_forward(cuda, logits, labels, **transform)
    h = cases.head(logits, **transform)
    found = (cuda.logits_logps(logits, labels, h, second_launch=s) for s in (False, True))
    cases.assert_same_bits(*map(cases.bits, found))
    out = torch.full_like(logits, cases.POISON)
    cases.check_backward(cuda, logits, labels, out, **transform)
    cases.check_backward(cuda, logits, labels, logits, **transform)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(9))
def test_any_alignment_and_row_stride(dtype, offset):
    logits, labels = cases.logits_and_labels(
        dtype, 4, 40037, row_stride=40039 + offset, offset=offset, ignored=(2,), device=DEVICE
    )
    cases.check_forward(cuda, logits, labels)
    wide = torch.full((4 * 40101 + 8,), cases.POISON, dtype=dtype, device=DEVICE)
    cases.check_backward(cuda, logits, labels, wide[3:].as_strided((4, 40037), (40101, 1)))


@pytest.mark.parametrize("reference", ["sequences", "tokens", "none"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_logits_to_the_loss(monkeypatch, dtype, average, packed, reference):
    monkeypatch.setenv("FASTDPO_BACKEND", "cuda")
    check_logits_dpo_loss(dtype, packed, reference, device=DEVICE, average_log_prob=average)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_what_the_hardwares_own_functions_decide(dtype):
    """Its exponential, maximum and reciprocal, which the CPU's tests have to imitate."""
    cases.check_extreme_logits(cuda, dtype, DEVICE)
    cases.check_neighbours_under_a_softcap(cuda, dtype, DEVICE)
    cases.check_certain_labels(cuda, dtype, DEVICE)
    cases.check_common_offset(cuda, DEVICE)
    cases.check_infinities_and_nan(cuda, DEVICE)
    cases.check_labels_outside(cuda, DEVICE)


@pytest.mark.parametrize("to", cases.DTYPES, ids=str)
def test_the_gradient_in_another_dtype(to):
    logits, labels = cases.logits_and_labels(torch.bfloat16, 3, 777, ignored=(1,), device=DEVICE)
    out = torch.full(logits.shape, cases.POISON, dtype=to, device=DEVICE)
    cases.check_backward(cuda, logits, labels, out, softcap=9.0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 77, 1024, 4096])
def test_target_logits(width, dtype):
    hidden = torch.randn(131, width, device=DEVICE).to(dtype)
    weight = torch.randn(503, width, device=DEVICE).to(dtype)
    bias = torch.randn(503, device=DEVICE)
    labels = torch.randint(0, 503, (131,), device=DEVICE)
    for transform in cases.TRANSFORMS:
        cases.check_target_logits(cuda, hidden, weight, labels, bias, **transform)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("average", [False, True])
def test_sequence_loss(pairs, average):
    for lengths in ([3, 5], [0, 1, 700, 256], [900] * 256):
        cases.check_sequence_loss(
            cuda, *cases.sequences(lengths, DEVICE), pairs=pairs, average=average
        )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("pairs", PAIRS)
def test_logits_to_loss_and_back(dtype, pairs):
    logits, labels = cases.logits_and_labels(dtype, 40, 5001, ignored=(0, 7, 39), device=DEVICE)
    offsets = torch.tensor([0, 9, 20, 20, 40], device=DEVICE)
    ref = -100 * torch.rand(4, device=DEVICE)
    cases.check_fused(
        cuda, logits, labels, offsets, ref, pairs=pairs, average=True, label_smoothing=0.1
    )


def everything(logits, labels):
    """One run of every primitive, as bits."""
    h = cases.head(logits, softcap=25.0)
    rows = labels.shape[0]
    offsets = torch.tensor([0, rows // 3, rows], device=DEVICE)
    fused = cuda.logits_sequence_loss(logits, labels, h, offsets, offsets[:2].float(), 0.1)
    out = logits.clone()
    cuda.logits_logps_backward(fused.row_coefficients, out, labels, fused.lse, h, out)
    a = cuda.target_logits(logits[:, :512], cases.Head(logits[:, :512]), labels % rows)
    return cases.bits(*fused, out, a)


def test_repeated_runs_agree_to_the_bit():
    logits, labels = cases.logits_and_labels(torch.bfloat16, 301, 128256, device=DEVICE)
    first = everything(logits, labels)
    for _ in range(10):
        cases.assert_same_bits(first, everything(logits, labels))


def test_a_row_does_not_depend_on_its_batch():
    logits, labels = cases.logits_and_labels(torch.bfloat16, 300, 50257, device=DEVICE)
    h = cases.head(logits)
    batch = cuda.logits_logps(logits, labels, h)
    for row in (0, 1, 7, 299):
        alone = cuda.logits_logps(logits[row : row + 1].clone(), labels[row : row + 1], h)
        expected = cases.bits(*(t[row : row + 1] for t in batch))
        cases.assert_same_bits(expected, cases.bits(*alone))


def test_nothing_waits_for_the_device():
    logits, labels = cases.logits_and_labels(torch.float16, 64, 32000, device=DEVICE)
    offsets = torch.tensor([0, 32, 64], device=DEVICE)
    ref, h = torch.zeros(2, device=DEVICE), cases.head(logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused = cuda.logits_sequence_loss(logits, labels, h, offsets, ref, 0.1)
        cuda.logits_logps_backward(
            fused.row_coefficients, logits, labels, fused.lse, h, logits, grad_scale=fused.loss.loss
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_and_a_graph():
    logits, labels = cases.logits_and_labels(torch.float32, 16, 40000, device=DEVICE)
    h = cases.head(logits)
    expected = cases.bits(*cuda.logits_logps(logits, labels, h))
    static = torch.zeros_like(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails where a kernel goes to any other stream
        captured = cuda.logits_logps(static, labels, h)
    static.copy_(logits)
    graph.replay()
    cases.assert_same_bits(expected, cases.bits(*captured))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current():
    with torch.cuda.device(0):
        logits, labels = cases.logits_and_labels(torch.float32, 4, 999, device="cuda:1")
        cases.check_forward(cuda, logits, labels)
        assert torch.cuda.current_device() == 0


def test_memory_beyond_the_results_is_a_few_bytes_a_row():
    logits, labels = cases.logits_and_labels(torch.bfloat16, 512, 128256, device=DEVICE)
    h = cases.head(logits)
    grad = torch.ones(512, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, lse = cuda.logits_logps(logits, labels, h)
    cuda.logits_logps_backward(grad, logits, labels, lse, h, logits)
    assert torch.cuda.max_memory_allocated() - before < 512 * 64 + 4096


def test_rows_beyond_two_to_the_31_elements():
    rows, vocab = 17000, 128256  # 2.2e9 elements
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free device memory")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE).normal_()
    labels = torch.full((rows,), -100, device=DEVICE)
    last = slice(rows - 3, rows)
    labels[last] = torch.tensor([0, 5, vocab - 1], device=DEVICE)
    tail = logits[last].clone()
    h = cases.head(logits)
    logps, lse = cuda.logits_logps(logits, labels, h)
    cases.assert_same_bits(
        cases.bits(*cuda.logits_logps(tail, labels[last], h)), cases.bits(logps[last], lse[last])
    )
    grad = torch.ones(rows, device=DEVICE)
    cuda.logits_logps_backward(grad, logits, labels, lse, h, logits)
    cuda.logits_logps_backward(grad[last], tail, labels[last], lse[last], h, tail)
    cases.assert_same_bits(cases.bits(tail), cases.bits(logits[last]))
    assert not logits[: rows - 3].any()


def test_pytorchs_own_check_of_every_op():
    logits, labels = cases.logits_and_labels(torch.float32, 6, 50, device=DEVICE)
    ops, transform = torch.ops.fastdpo_cuda, (1.0, 0.0, 1.0)
    logps, lse = ops.logits_logps(logits, labels, *transform)
    offsets = torch.tensor([0, 2, 6], device=DEVICE)
    ref, loss = torch.zeros(2, device=DEVICE), (0.1, 0.0, False, False)
    for op, arguments in (
        (ops.target_logits, (logits, logits, None, labels % 6, *transform)),
        (ops.logits_logps, (logits, labels, *transform)),
        (
            ops.logits_logps_backward,
            (logps, logits, labels, lse, *transform, logits.clone(), None),
        ),
        (ops.sequence_loss, (logps, None, offsets, ref, *loss)),
        (ops.logits_sequence_loss, (logits, labels, offsets, ref, *transform, *loss)),
    ):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op, arguments, test_utils=checks)


SANITIZED = """
import sys
import torch
import cases
from public_cases import check_logits_dpo_loss
from fastdpo.backends import cuda
for dtype in cases.DTYPES:
    for vocab, offset in ((9, 1), (1037, 3), (40037, 5)):
        logits, labels = cases.logits_and_labels(
            dtype, 4, vocab, offset=offset, ignored=(2,), device="cuda"
        )
        logits = logits.clone() if offset == 1 else logits
        h = cases.head(logits, softcap=9.0)
        offsets = torch.tensor([0, 2, 4], device="cuda")
        ref = torch.tensor([0.0, 2.0]).to("cuda")
        picked = (labels.cpu().clamp(0) % 4).to("cuda")
        fused = cuda.logits_sequence_loss(logits, labels, h, offsets, ref, 0.1)
        cuda.logits_logps_backward(fused.row_coefficients, logits, labels, fused.lse, h, logits)
        cuda.target_logits(logits, cases.Head(logits.clone()), picked)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH")
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        # Only our kernels: what PyTorch launches is not ours to judge. (So initcheck does not see
        # what those write: the program's inputs come from the CPU.)
        [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=fastdpo",
         sys.executable, "-c", SANITIZED],
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # or an overrun lands in the same block
            "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
