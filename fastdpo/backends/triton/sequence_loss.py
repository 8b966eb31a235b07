"""sequence_loss: log-probabilities -> masked sums, DPO loss, rewards, coefficients, in one launch.

With h = logp − ref the log-ratio of a sequence, m = β (h_chosen − h_rejected) the margin and ε the
label smoothing,

    loss = −(1 − ε) log σ(m) − ε log σ(−m)         ∂loss/∂m = ε − σ(−m)

Operations: N additions in fp64 and about 50 operations per sequence. Bytes: 4·N read, and 24 per
sequence of offsets, references and results; neither V nor D matters. One program does everything:
that is a few hundred kilobytes at most, and one program's order of additions is the same every
time. It waits for memory more than anything else, so its time is a latency, not a rate. Sums are
carried in fp64 and start at each sequence's own first token, so that neither padding nor the rest
of the batch can show.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sequence_sums(
    logps_ptr,  # [N]
    offsets_ptr,  # [2B + 1]
    sequence,  # [S]
    mask,  # [S]
    BLOCK_T: tl.constexpr,
):
    """Σ of each sequence's tokens [S] in fp64, and its length [S]."""
    start = tl.load(offsets_ptr + sequence, mask=mask, other=0)
    length = tl.load(offsets_ptr + sequence + 1, mask=mask, other=0) - start
    sums = tl.zeros((sequence.shape[0], BLOCK_T), tl.float64)
    for first in range(0, tl.max(length, 0), BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        place = logps_ptr + start[:, None] + token[None, :]
        part = tl.load(place, mask=token[None, :] < length[:, None], other=0.0)
        sums += part.to(tl.float64)
    return tl.sum(sums, 1), length


@triton.jit
def _log_sigmoid(x):
    e = tl.exp(-tl.abs(x))
    # log(1 + e), by its series where the sum would round e away.
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3.0)))
    return tl.minimum(x, 0.0) - tl.where(e < 1e-5, series, tl.log(1.0 + e))


@triton.jit(do_not_specialize=["pairs"])
def sequence_loss_kernel(
    logps_ptr,  # [N] fp32
    offsets_ptr,  # [2B + 1] int64
    ref_ptr,  # [2B] fp32
    loss_ptr,  # [1] fp32
    sums_ptr,  # [2B] fp32
    rewards_ptr,  # [2B] fp32
    coefficients_ptr,  # [2B] fp32
    pairs,
    beta,
    label_smoothing,
    AVERAGE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    count = pairs
    dtype = sums_ptr.dtype.element_ty
    smoothing = tl.full((BLOCK_B,), 0.0, tl.float64) + label_smoothing
    losses = tl.zeros((BLOCK_B,), tl.float64)
    for first in range(0, count, BLOCK_B):
        pair = first + tl.arange(0, BLOCK_B)
        mask = pair < count
        chosen, rejected = pair, pair + count
        if INTERLEAVED:
            chosen, rejected = 2 * pair, 2 * pair + 1
        sum_w, length_w = _sequence_sums(logps_ptr, offsets_ptr, chosen, mask, BLOCK_T)
        sum_l, length_l = _sequence_sums(logps_ptr, offsets_ptr, rejected, mask, BLOCK_T)
        count_w = tl.full((BLOCK_B,), 1.0, tl.float64)
        count_l = count_w
        # Rounded before the reference is subtracted, as the reference was: equal models differ by
        # exactly 0.
        sum_w, sum_l = sum_w.to(dtype).to(tl.float64), sum_l.to(dtype).to(tl.float64)
        if AVERAGE:
            count_w = tl.maximum(length_w, 1).to(tl.float64)
            count_l = tl.maximum(length_l, 1).to(tl.float64)
            # And so is the quotient (which fp64 rounds to what fp32 would).
            sum_w = (sum_w / count_w).to(dtype).to(tl.float64)
            sum_l = (sum_l / count_l).to(dtype).to(tl.float64)
        reward_w = (sum_w - tl.load(ref_ptr + chosen, mask=mask, other=0.0).to(tl.float64)) * beta
        reward_l = (sum_l - tl.load(ref_ptr + rejected, mask=mask, other=0.0).to(tl.float64)) * beta
        margin = reward_w - reward_l
        # Without smoothing 0 · log σ(−∞) of an impossible rejected answer would be NaN.
        flipped = tl.where(smoothing > 0.0, smoothing * _log_sigmoid(-margin), 0.0)
        loss = -(1.0 - smoothing) * _log_sigmoid(margin) - flipped
        losses += tl.where(mask, loss, 0.0)
        slope = (smoothing - tl.exp(_log_sigmoid(-margin))) * beta / count
        tl.store(sums_ptr + chosen, sum_w.to(dtype), mask=mask)
        tl.store(sums_ptr + rejected, sum_l.to(dtype), mask=mask)
        tl.store(rewards_ptr + chosen, reward_w.to(dtype), mask=mask)
        tl.store(rewards_ptr + rejected, reward_l.to(dtype), mask=mask)
        tl.store(coefficients_ptr + chosen, (slope / count_w).to(dtype), mask=mask)
        tl.store(coefficients_ptr + rejected, (-slope / count_l).to(dtype), mask=mask)
    tl.store(loss_ptr, (tl.sum(losses, 0) / count).to(loss_ptr.dtype.element_ty))
