"""The label's own logit, run on the CPU."""

from __future__ import annotations

import cases
import pytest
import torch

# A lane's vector, a warp's row of vectors, a ragged round of them, more than one round.
WIDTHS = (1, 7, 8, 33, 257, 1030)


def operands(dtype, rows, vocab, width, pad=0, offset=0):
    def matrix(n):
        storage = torch.full((offset + n * (width + pad) + width,), cases.POISON, dtype=dtype)
        view = storage[offset:].as_strided((n, width), (width + pad, 1))
        return view.copy_(torch.randn(n, width))

    return matrix(rows), matrix(vocab), torch.randint(0, vocab, (rows,))


@pytest.mark.parametrize("transform", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_target_logits_match_the_oracle(cuda, dtype, transform):
    for width in WIDTHS:
        hidden, weight, labels = operands(dtype, 11, 23, width)
        cases.check_target_logits(cuda, hidden, weight, labels, **transform)


@pytest.mark.parametrize("bias_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bias_in_any_dtype(cuda, dtype, bias_dtype):
    hidden, weight, labels = operands(dtype, 5, 9, 40)
    bias = torch.randn(9).to(bias_dtype)
    cases.check_target_logits(cuda, hidden, weight, labels, bias, softcap=4.0, scale=0.5)


@pytest.mark.parametrize("offset", range(8))
def test_any_alignment_of_either_operand(cuda, offset):
    for dtype in cases.DTYPES:
        hidden, weight, labels = operands(dtype, 9, 13, 101, pad=3, offset=offset)
        cases.check_target_logits(cuda, hidden, weight, labels)
        # And the same bits as from aligned rows.
        h, aligned = cases.Head(weight), cases.Head(weight.contiguous())
        here = cuda.target_logits(hidden, h, labels)
        there = cuda.target_logits(hidden.contiguous()[:3], aligned, labels[:3])
        cases.assert_same_bits(cases.bits(here[:3]), cases.bits(there))


def test_labels_outside_the_vocabulary_are_nan_and_never_read(cuda):
    hidden, weight, _ = operands(torch.float32, 4, 6, 32)
    labels = torch.tensor([-1, 6, 1 << 40, 2])
    out = cuda.target_logits(hidden, cases.Head(weight), labels)
    assert out.isnan().tolist() == [True, True, True, False]


def test_any_schedule_gives_the_same_bits(cuda, host):
    hidden, weight, labels = operands(torch.bfloat16, 19, 23, 777)
    in_order = cases.bits(cuda.target_logits(hidden, cases.Head(weight), labels))
    for seed in (1, 2, 3):
        with host.schedule(seed):
            shuffled = cuda.target_logits(hidden, cases.Head(weight), labels)
        cases.assert_same_bits(in_order, cases.bits(shuffled))


def test_no_rows(cuda, host):
    before = host.blocks()
    hidden, weight, labels = operands(torch.float32, 0, 3, 8)
    assert cuda.target_logits(hidden, cases.Head(weight), labels).shape == (0,)
    assert host.blocks() == before


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_rows_beyond_two_to_the_31_elements(cuda, which):
    hidden, weight, labels = operands(torch.bfloat16, 2, 2, 40)
    labels[:] = torch.tensor([1, 0])
    far = {"hidden": hidden, "weight": weight}
    far[which] = cases.far_apart(far[which], (1 << 31) + 24)
    cases.check_target_logits(cuda, far["hidden"], far["weight"], labels)
