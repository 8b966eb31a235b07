"""Sequence sums and the DPO sigmoid loss, alone and behind the logits, run on the CPU."""

from __future__ import annotations

import math

import cases
import pytest
import torch

PAIRS = ("concatenated", "interleaved")


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_sequence_loss_matches_the_oracle(cuda, pairs, average, label_smoothing):
    for lengths in ([3, 5], [0, 1, 700, 256], [1, 0, 0, 257, 300, 2]):
        cases.check_sequence_loss(
            cuda,
            *cases.sequences(lengths),
            pairs=pairs,
            average=average,
            label_smoothing=label_smoothing,
        )


@pytest.mark.parametrize("beta", [0.0, -0.3, 1e-4, 5.0])
def test_any_beta(cuda, beta):
    cases.check_sequence_loss(cuda, *cases.sequences([4, 9, 2, 5]), beta=beta)


@pytest.mark.parametrize("average", [False, True])
def test_equal_policy_and_reference_are_ln_2_to_the_bit(cuda, average):
    for seed in range(20):
        torch.manual_seed(seed)
        logps, offsets, _ = cases.sequences([31, 4000, 7, 77, 0, 12])
        ref = cases.reference.sequence_sums(logps, offsets.diff())
        if average:
            ref = ref / offsets.diff().clamp(min=1)
        options = (0.1, 0.0, average, PAIRS[0])
        loss, sums, rewards, _ = cuda.sequence_loss(logps, offsets, ref, *options)
        assert torch.equal(sums, ref)
        assert torch.equal(rewards, torch.zeros(6))
        assert loss.item() == torch.tensor(math.log(2.0)).item()


def test_margins_beyond_the_range_of_exp(cuda):
    logps = torch.tensor([-1.0, -5000.0, -4000.0, -3.0])
    offsets, ref = torch.arange(5), torch.zeros(4)
    loss, _, _, coefficients = cuda.sequence_loss(logps, offsets, ref, 1.0, 0.0, False, PAIRS[0])
    assert loss.item() == pytest.approx((0.0 + 4997.0) / 2)
    assert coefficients.tolist() == pytest.approx([0.0, -0.5, 0.0, 0.5], abs=1e-30)


def test_no_pairs_is_a_loss_of_zero(cuda, host):
    before = host.blocks()
    empty = torch.empty(0)
    loss, *others = cuda.sequence_loss(
        empty, torch.zeros(1, dtype=torch.int64), empty, 0.1, 0.0, False, PAIRS[0]
    )
    assert loss.item() == 0.0
    assert all(t.shape == (0,) for t in others)
    assert host.blocks() == before


def test_sums_are_carried_in_fp64(cuda):
    """One large number among many small ones, which fp32 would not add to it."""
    logps = torch.full((20_000,), -1e-4)
    logps[0] = -1e5
    offsets = torch.tensor([0, 20_000, 20_000])
    loss = cuda.sequence_loss(logps, offsets, torch.zeros(2), 0.1, 0.0, False, PAIRS[0])
    assert loss.logps[0] == logps.double().sum().float()


def test_no_pairs_leave_no_gradient(cuda):
    logits, labels = cases.logits_and_labels(torch.float32, 5, 20)
    none, empty = torch.zeros(1, dtype=torch.int64), torch.empty(0)
    found = cuda.logits_sequence_loss(logits, labels, cases.head(logits), none, empty, 0.1)
    assert found.loss.loss == 0.0
    assert torch.equal(found.row_coefficients, torch.zeros(5))


def test_offsets_that_lie_are_clamped_to_the_rows_there_are(cuda):
    """They come from the device and cannot be refused without waiting for it."""
    logps = torch.full((6,), -1.0)
    offsets = torch.tensor([-4, 2, 1 << 40])
    results = cuda.sequence_loss(logps, offsets, torch.zeros(2), 0.1, 0.0, False, PAIRS[0])
    assert results.logps.tolist() == [-2.0, -4.0]
    offsets = torch.tensor([9, 3, 7])
    results = cuda.sequence_loss(logps, offsets, torch.zeros(2), 0.1, 0.0, False, PAIRS[0])
    assert results.logps.tolist() == [0.0, -3.0]


def test_a_pair_has_the_same_bits_in_any_batch(cuda):
    logps, offsets, ref = cases.sequences([300, 41])
    alone = cuda.sequence_loss(logps, offsets, ref, 0.1, 0.1, True, PAIRS[1])
    around, around_offsets, around_ref = cases.sequences([7, 1000, 0, 3])
    batch = cuda.sequence_loss(
        torch.cat([around, logps]),
        torch.cat([around_offsets, around_offsets[-1] + offsets[1:]]),
        torch.cat([around_ref, ref]),
        0.1, 0.1, True, PAIRS[1],
    )  # fmt: skip
    cases.assert_same_bits(
        cases.bits(alone.logps, alone.rewards), cases.bits(batch.logps[4:], batch.rewards[4:])
    )


def fused_inputs(dtype=torch.float32, vocab=50, ragged=True):
    lengths = [5, 0, 9, 3] if ragged else [4, 4, 4, 4]
    rows = sum(lengths)
    ignored = (0, 3, 8, 9) if ragged else (3, 7, 11, 15)
    logits, labels = cases.logits_and_labels(dtype, rows, vocab, ignored=ignored)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return logits, labels, offsets, -10 * torch.rand(4)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("transform", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_logits_to_loss_and_back_match_autograd(cuda, dtype, transform, average, pairs):
    for ragged in (False, True):
        cases.check_fused(
            cuda,
            *fused_inputs(dtype, ragged=ragged),
            upstream=1.7,
            average=average,
            pairs=pairs,
            label_smoothing=0.1,
            **transform,
        )


def test_rows_of_no_sequence_get_no_gradient(cuda):
    logits, labels = cases.logits_and_labels(torch.float32, 12, 20)
    offsets = torch.tensor([3, 5, 9])
    cases.check_fused(cuda, logits, labels, offsets, torch.tensor([-7.0, -9.0]))


def test_any_schedule_gives_the_same_bits(cuda, host):
    logits, labels, offsets, ref = fused_inputs(vocab=40000)
    h = cases.head(logits)

    def run():
        return cases.bits(*cuda.logits_sequence_loss(logits, labels, h, offsets, ref, 0.1, 0.1))

    in_order = run()
    for seed in (1, 2, 3):
        with host.schedule(seed):
            cases.assert_same_bits(in_order, run())


def test_the_mean_over_many_pairs_does_not_depend_on_who_is_last(cuda, host):
    logps, offsets, ref = cases.sequences([2] * 600)
    in_order = cuda.sequence_loss(logps, offsets, ref, 0.1, 0.0, False, PAIRS[0])
    cases.check_sequence_loss(cuda, logps, offsets, ref)
    with host.schedule(11):
        shuffled = cuda.sequence_loss(logps, offsets, ref, 0.1, 0.0, False, PAIRS[0])
    cases.assert_same_bits(cases.bits(*in_order), cases.bits(*shuffled))
