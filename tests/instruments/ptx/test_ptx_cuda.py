"""The CUDA C++ kernels' PTX on the CPU, held to the fp64 oracle and to the host build's bits.

All of tests/instruments/host runs this way too, in two minutes, with FASTDPO_HOST_PTX=80.
"""

from __future__ import annotations

import dataclasses
import re

import cases
import pytest
import torch
from sampling import sampled

from benchmarks.instruments.host import backend, build
from benchmarks.instruments.ptx import cuda_kernels, floats
from benchmarks.instruments.ptx.faults import OutOfBounds, Race, Uninitialised

DTYPES, STRETCH = cases.DTYPES, 65536
SOFTCAP = {"scale": 1.5, "softcap": 20.0, "temperature": 1.3}


@pytest.fixture(scope="session")
def host():
    why = build.missing() or (None if cuda_kernels.find_nvcc() else "nvcc is not on PATH")
    if why is not None:
        pytest.skip(f"running nvcc's PTX needs nvcc, g++ and pybind11: {why}")
    return backend.Host(build.build())


@pytest.fixture(scope="session")
def executed(host):
    return cuda_kernels.Executed(host, 90)


@pytest.fixture
def cuda(executed):
    with cuda_kernels.installed(executed) as module:
        yield module


@pytest.mark.parametrize("transform", [{}, SOFTCAP], ids=str)
@pytest.mark.parametrize("dtype", sampled(DTYPES, (torch.bfloat16,)), ids=str)
def test_logits_logps_and_its_gradient(cuda, dtype, transform):
    for vocab in (1, 9, 4099, STRETCH // dtype.itemsize + 5):
        logits, labels = cases.logits_and_labels(dtype, 4, vocab, ignored=(1,))
        labels[0], labels[2] = 0, vocab - 1
        cases.check_forward(cuda, logits, labels, **transform)
        h = cases.head(logits, **transform)
        found = (cuda.logits_logps(logits, labels, h, second_launch=s) for s in (False, True))
        cases.assert_same_bits(*map(cases.bits, found))
        cases.check_backward(cuda, logits, labels, torch.full_like(logits, torch.nan), **transform)
        cases.check_backward(cuda, logits, labels, logits, **transform)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_any_alignment(cuda, dtype):
    for offset in (0, 1, 3):
        logits, labels = cases.logits_and_labels(
            dtype, 3, 1037, row_stride=1039 + offset, offset=offset, ignored=(2,)
        )
        cases.check_forward(cuda, logits, labels)
        wide = torch.zeros(3 * 1101 + 8, dtype=dtype)
        out = wide[offset:].as_strided((3, 1037), (1101, 1))
        cases.check_backward(cuda, logits, labels, out)


def test_gradients_in_another_dtype(cuda):
    logits, labels = cases.logits_and_labels(torch.bfloat16, 3, 777, ignored=(1,))
    for dtype in (torch.float32, torch.float16):
        out = torch.full(logits.shape, torch.nan, dtype=dtype)
        cases.check_backward(
            cuda, logits, labels, out, grad_scale=torch.tensor(-2.5), scale=0.5, softcap=9.0
        )


@pytest.mark.parametrize("dtype", sampled(DTYPES, (torch.bfloat16,)), ids=str)
def test_extremes(cuda, dtype):
    cases.check_extreme_logits(cuda, dtype)
    cases.check_certain_labels(cuda, dtype)
    cases.check_neighbours_under_a_softcap(cuda, dtype)


def test_infinities_nan_and_labels_outside(cuda):
    cases.check_infinities_and_nan(cuda)
    cases.check_labels_outside(cuda)
    cases.check_common_offset(cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_logits(cuda, dtype):
    for width in (1, 37, 1040):
        hidden, weight = torch.randn(11, width).to(dtype), torch.randn(50, width).to(dtype)
        labels = torch.randint(0, 50, (11,))
        bias = torch.randn(50).to(dtype)
        cases.check_target_logits(cuda, hidden, weight, labels)
        cases.check_target_logits(cuda, hidden, weight, labels, bias, **SOFTCAP)


@pytest.mark.parametrize("pairs", ["concatenated", "interleaved"])
def test_sequence_loss(cuda, pairs):
    for average in (False, True):
        logps, offsets, ref = cases.sequences([300, 41, 0, 3, 1, 700])
        cases.check_sequence_loss(
            cuda, logps, offsets, ref, average=average, label_smoothing=0.1, pairs=pairs
        )


def test_logits_to_loss_and_back(cuda):
    lengths = [5, 0, 9, 3]
    logits, labels = cases.logits_and_labels(torch.bfloat16, 17, 50, ignored=(0, 3, 8, 9))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    cases.check_fused(cuda, logits, labels, offsets, -10 * torch.rand(4), average=True, **SOFTCAP)


def everything(cuda, dtype) -> list[torch.Tensor]:
    """The bits of every kernel's results."""
    torch.manual_seed(1)
    vocab = STRETCH // dtype.itemsize + 1001
    logits, labels = cases.logits_and_labels(dtype, 4, vocab, ignored=(1,), offset=1)
    h = cases.head(logits, **SOFTCAP)
    offsets, ref = torch.tensor([0, 1, 2, 3, 4]), -10 * torch.rand(4)
    results = cuda.logits_sequence_loss(logits, labels, h, offsets, ref, 0.1, 0.1)
    out = torch.empty_like(logits)
    cuda.logits_logps_backward(results.row_coefficients, logits, labels, results.lse, h, out)
    rows = logits[:, :600].nan_to_num()
    target = cuda.target_logits(rows, cases.Head(rows), labels.clamp(0, 3))
    return cases.bits(*results, out, target)


@pytest.mark.parametrize("dtype", sampled(DTYPES, (torch.bfloat16,)), ids=str)
def test_any_order_of_blocks_gives_the_same_bits(cuda, executed, dtype):
    in_order = everything(cuda, dtype)
    with executed.schedule(7):
        cases.assert_same_bits(in_order, everything(cuda, dtype))


@pytest.mark.parametrize("dtype", sampled(DTYPES, (torch.bfloat16,)), ids=str)
def test_nvcc_and_gcc_agree_but_for_the_approximations(executed, host, dtype, monkeypatch):
    monkeypatch.setattr(floats, "BLUR", False)
    with cuda_kernels.installed(executed) as cuda:
        ours = everything(cuda, dtype)
    with backend.installed(host) as cuda:
        theirs = everything(cuda, dtype)
    gradient = 7
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if n == gradient and dtype == torch.float32:
            # gcc's exp2f is not always the nearest number either.
            assert (a != b).float().mean() < 1e-3
            assert (a.long() - b.long()).abs().max() <= 2
        else:
            assert torch.equal(a, b)


def test_rows_beyond_two_to_the_31_elements(cuda):
    cases.check_rows_beyond_two_to_the_31_elements(cuda)


# ---- That these checks can fail: kernels broken on purpose


def broken(executed, kernel: str, pattern: str, replacement: str | None) -> cuda_kernels.Executed:
    """With the first instruction that matches put otherwise, or left out, in some kernels."""
    result = cuda_kernels.Executed(executed.host, 90)
    for name, whole in result.kernels.items():
        if f"{kernel}_kernel" not in name:
            continue
        changed = [dataclasses.replace(i) for i in whole.instructions]
        at = next(n for n, i in enumerate(changed) if re.match(pattern, i.text))
        if replacement is None:
            changed[at].opcode, changed[at].operands = "membar.gl", []
        else:
            changed[at].opcode = re.sub(pattern, replacement, changed[at].opcode)
        result.kernels[name] = dataclasses.replace(whole, instructions=changed)
    return result


@pytest.mark.parametrize(
    ("kernel", "pattern", "replacement", "fault"),
    [
        ("logits_logps", "bar.sync", None, (Race, Uninitialised)),
        ("sequence_loss", "bar.sync", None, (Race, Uninitialised)),
        ("logits_logps", "sub.rn", "add.rn", AssertionError),
        ("logits_logps_backward", "add.s64", "sub.s64", OutOfBounds),
        ("logits_logps_backward", "ex2", "rcp", AssertionError),
        ("target_logits", "add.rn", "sub.rn", AssertionError),
    ],
)
def test_a_broken_kernel_is_noticed(executed, kernel, pattern, replacement, fault):
    subject = broken(executed, kernel, pattern, replacement)
    logits, labels = cases.logits_and_labels(torch.bfloat16, 3, 1037, ignored=(2,))

    def check(cuda) -> None:
        cases.check_forward(cuda, logits, labels)
        cases.check_backward(cuda, logits, labels, torch.empty_like(logits))
        cases.check_sequence_loss(cuda, *cases.sequences([300, 41]))
        hidden, weight = torch.randn(9, 100), torch.randn(5, 100)
        cases.check_target_logits(cuda, hidden, weight, labels.new_ones(9))

    with cuda_kernels.installed(subject) as cuda, pytest.raises(fault):
        check(cuda)


def test_a_read_past_a_row_is_noticed(executed, monkeypatch):
    """The last element of every row is taken away from the kernel."""
    whole = cuda_kernels._of_forward

    def short(p, blocks, types):
        found = whole(p, blocks, types)
        return [found[0]._replace(length=found[0].length - 1), *found[1:]]

    monkeypatch.setitem(cuda_kernels._KERNELS, "logits_logps", (cuda_kernels._FORWARD, short))
    with cuda_kernels.installed(executed) as cuda:
        for vocab in (1, 8, 999, 4096):
            logits, labels = cases.logits_and_labels(torch.bfloat16, 1, vocab)
            with pytest.raises(OutOfBounds, match="bytes from logits"):
                cuda.logits_logps(logits, labels, cases.head(logits))
