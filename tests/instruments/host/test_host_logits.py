"""Forward and backward over materialized logits, run on the CPU."""

from __future__ import annotations

import os

import cases
import pytest
import torch

from benchmarks.instruments.host import backend as host_backend

STRETCH = 65536  # bytes of a row per block

# One element; less, exactly and more than a 16-byte vector; many vectors; a ragged round of the
# block; rows of two and three stretches.
VOCABULARIES = (1, 2, 7, 8, 9, 33, 1000, 4099, STRETCH // 4 + 5, STRETCH // 2 + 3)


@pytest.mark.parametrize("transform", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward_matches_the_oracle(cuda, dtype, transform):
    for vocab in VOCABULARIES:
        logits, labels = cases.logits_and_labels(dtype, 5, vocab, ignored=(1, 4))
        labels[0], labels[2] = 0, vocab - 1
        cases.check_forward(cuda, logits, labels, **transform)


@pytest.mark.parametrize("transform", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_backward_matches_the_oracle_in_place_and_not(cuda, dtype, transform):
    for vocab in VOCABULARIES:
        logits, labels = cases.logits_and_labels(dtype, 5, vocab, ignored=(0, 3))
        labels[1], labels[4] = 0, vocab - 1
        out = torch.full_like(logits, cases.POISON)
        cases.check_backward(cuda, logits, labels, out, **transform)
        cases.check_backward(cuda, logits, labels, logits, **transform)


@pytest.mark.parametrize("size", [STRETCH // 8, STRETCH // 4, STRETCH // 2, STRETCH])
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
def test_rows_that_end_where_a_round_or_a_stretch_ends(cuda, dtype, size):
    """One element less, none, one more, on a 16-byte boundary and one element past it."""
    for vocab in range(size // dtype.itemsize - 1, size // dtype.itemsize + 2):
        for offset in (0, 1):
            logits, labels = cases.logits_and_labels(dtype, 2, vocab, offset=offset, ignored=(1,))
            labels[0] = vocab - 1
            cases.check_forward(cuda, logits, labels)
            out = torch.full((2 * vocab + 1,), cases.POISON, dtype=dtype)[offset:][: 2 * vocab]
            cases.check_backward(cuda, logits, labels, out.view(2, vocab))
            cases.check_backward(cuda, logits, labels, logits)


def test_aligned_rows_take_no_block_more_than_they_need(cuda, host):
    vocab = STRETCH // 2
    for offset, blocks in ((0, 1), (8, 1), (1, 2)):
        logits, labels = cases.logits_and_labels(torch.bfloat16, 3, vocab, offset=offset)
        _, lse = cuda.logits_logps(logits, labels, cases.head(logits))
        before = host.blocks()
        cuda.logits_logps_backward(torch.ones(3), logits, labels, lse, cases.head(logits), logits)
        assert host.blocks() - before == 3 * blocks


def test_the_gradient_is_rounded_to_nearest(cuda):
    """The same bits as PyTorch makes of the fp32 gradient."""
    for dtype in cases.DTYPES[1:]:
        logits, labels = cases.logits_and_labels(dtype, 3, 999, offset=1)
        _, lse = cuda.logits_logps(logits, labels, cases.head(logits))
        rounded, wide = torch.empty_like(logits), torch.empty(logits.shape)
        for out in (rounded, wide):
            grad = torch.linspace(-1, 2, 3)
            cuda.logits_logps_backward(grad, logits, labels, lse, cases.head(logits), out)
        cases.assert_same_bits(cases.bits(rounded), cases.bits(wide.to(dtype)))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(9))
def test_any_alignment_and_row_stride(cuda, dtype, offset):
    logits, labels = cases.logits_and_labels(
        dtype, 4, 1037, row_stride=1039 + offset, offset=offset, ignored=(2,)
    )
    cases.check_forward(cuda, logits, labels)
    # The gradient's rows lie elsewhere than the logits': neither alignment nor stride is shared.
    for shift in (0, 3):
        wide = torch.full((4 * 1101 + 8,), cases.POISON, dtype=dtype)
        out = wide[shift:].as_strided((4, 1037), (1101, 1))
        cases.check_backward(cuda, logits, labels, out)
        around = torch.ones_like(wide, dtype=torch.bool)
        around[shift:].as_strided((4, 1037), (1101, 1)).fill_(False)
        assert wide[around].isnan().all(), "written outside of out"
    cases.check_backward(cuda, logits, labels, logits)


@pytest.mark.parametrize("to", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_gradient_in_another_dtype(cuda, dtype, to):
    logits, labels = cases.logits_and_labels(dtype, 3, 777, ignored=(1,))
    out = torch.full(logits.shape, cases.POISON, dtype=to)
    cases.check_backward(cuda, logits, labels, out, scale=0.5, softcap=9.0)


def test_an_expanded_gradient_and_a_scale_on_the_device(cuda):
    logits, labels = cases.logits_and_labels(torch.float32, 6, 100, ignored=(5,))
    expanded = torch.tensor([0.37]).expand(6)
    strided = torch.randn(12)[::2]
    scale = torch.tensor(-2.5)
    for grad in (expanded, strided):
        out = torch.empty_like(logits)
        cases.check_backward(cuda, logits, labels, out, grad=grad, grad_scale=scale)
    out = torch.full_like(logits, cases.POISON)
    cases.check_backward(cuda, logits, labels, out, grad=torch.zeros(6))
    assert bool((out == 0).all())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_row_has_the_same_bits_wherever_it_lies_and_whoever_is_beside_it(cuda, dtype):
    vocab = STRETCH // dtype.itemsize + 1001
    row, _ = cases.logits_and_labels(dtype, 1, vocab)
    label = torch.tensor([vocab // 3])
    h = cases.head(row, softcap=30.0)
    alone = cases.bits(cuda.logits_logps(row, label, h))
    for offset in range(1, 16 // dtype.itemsize):
        logits, labels = cases.logits_and_labels(dtype, 2, vocab, offset=offset, ignored=(0,))
        logits[1], labels[1] = row[0], label[0]
        again = cuda.logits_logps(logits, labels, h)
        cases.assert_same_bits(alone, cases.bits(again[0][1:], again[1][1:]))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_any_schedule_gives_the_same_bits(cuda, host, dtype):
    vocab = 2 * STRETCH // dtype.itemsize + 777
    logits, labels = cases.logits_and_labels(dtype, 3, vocab, ignored=(1,))
    h = cases.head(logits, scale=0.7)

    def run():
        logps, lse = cuda.logits_logps(logits, labels, h)
        out = logits.clone()
        cuda.logits_logps_backward(torch.ones(3), out, labels, lse, h, out)
        return cases.bits(logps, lse, out)

    in_order = run()
    for seed in (1, 2, 3):
        with host.schedule(seed):
            cases.assert_same_bits(in_order, run())


@pytest.mark.parametrize("transform", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_last_block_and_a_second_launch_agree_to_the_bit(cuda, dtype, transform):
    with_loss = (1, 255, 256, 299)  # the second launch has 256 rows a block
    for vocab in (1000, 2 * STRETCH // dtype.itemsize + 777):
        logits = torch.randn(vocab).to(dtype).expand(300, vocab)
        labels = torch.full((300,), -100)
        labels[list(with_loss)] = torch.tensor([0, 5, vocab // 2, vocab - 1])
        h = cases.head(logits, **transform)
        found = [
            cases.bits(cuda.logits_logps(logits, labels, h, second_launch=second))
            for second in (False, True)
        ]
        cases.assert_same_bits(*found)
        assert found[0][0][list(with_loss)].all()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_extreme_logits(cuda, dtype):
    cases.check_extreme_logits(cuda, dtype)


def test_a_large_common_offset_costs_no_accuracy(cuda):
    cases.check_common_offset(cuda)


def test_infinities_and_nan_come_out_as_the_oracle_has_them(cuda):
    cases.check_infinities_and_nan(cuda)


def test_labels_outside_the_vocabulary_are_nan_and_never_read(cuda):
    cases.check_labels_outside(cuda)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_an_element_under_a_softcap_has_the_same_bits_whoever_is_beside_it(cuda, dtype):
    cases.check_neighbours_under_a_softcap(cuda, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_certain_label_has_no_gradient(cuda, dtype):
    cases.check_certain_labels(cuda, dtype)


def test_nothing_to_do(cuda, host):
    before = host.blocks()
    logits, labels = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
    logps, lse = cuda.logits_logps(logits, labels, cases.head(logits))
    cuda.logits_logps_backward(logps, logits, labels, lse, cases.head(logits), logits)
    assert (logps.shape, lse.shape) == ((0,), (0, 2))
    assert host.blocks() == before


def test_all_rows_ignored(cuda):
    logits, labels = cases.logits_and_labels(torch.float16, 3, 40000, ignored=(0, 1, 2))
    cases.check_forward(cuda, logits, labels)
    cases.check_backward(cuda, logits, labels, logits)


@pytest.mark.skipif(
    os.environ.get(host_backend.SANITIZE_VARIABLE) == "1",
    reason="the sanitizer's shadow of eight untouched GiB is not untouched",
)
def test_rows_beyond_two_to_the_31_elements(cuda):
    cases.check_rows_beyond_two_to_the_31_elements(cuda)
