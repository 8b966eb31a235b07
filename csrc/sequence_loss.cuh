// From token log-probabilities to the DPO sigmoid loss (arXiv 2305.18290, equation 7, with label
// smoothing):
//
//     h_s = Σ_t logp_t        divided by the number of tokens where `average`
//     r_s = β · (h_s − ref_s)
//     m_b = r_chosen − r_rejected
//     loss = mean_b −[(1 − ε) · log σ(m_b) + ε · log σ(−m_b)]
//     ∂loss/∂m_b = (ε − σ(−m_b)) / B
//     coefficient_s = ± β · ∂loss/∂m_b / count_s
//
// Bytes moved: 4 per token (12 with labels), and 4 per token more where the coefficients are wanted
// expanded to rows. One block per pair; the last one to finish takes the mean. (Unmeasured:
// last-block-done was chosen over a second launch because a launch costs more than the mean of a
// batch of pairs.) Sums are carried in fp64 and in an order that only the sequence itself decides,
// so that padding and batching cannot show.
#pragma once

#include "common.cuh"
#include "params.h"

namespace fastdpo {

namespace sequence_loss {

struct Span {
  int64_t begin;
  int64_t end;
};

// Clamped to the rows there are: offsets that lie cannot make a kernel read elsewhere.
__device__ __forceinline__ Span span_of(const SequenceLossParams& p, int64_t sequence) {
  int64_t begin = p.offsets[sequence], end = p.offsets[sequence + 1];
  begin = begin < 0 ? 0 : begin > p.rows ? p.rows : begin;
  end = end < begin ? begin : end > p.rows ? p.rows : end;
  return {begin, end};
}

__device__ __forceinline__ bool counts(const SequenceLossParams& p, int64_t row) {
  return p.labels == nullptr || p.labels[row] >= 0;
}

struct SequenceSum {
  double logps;
  double count;  // exact up to 2^53
};

// In thread 0.
__device__ __forceinline__ SequenceSum sum_sequence(const SequenceLossParams& p, Span span,
                                                    double* scratch) {
  double total = 0.0, count = 0.0;
  for (int64_t row = span.begin + threadIdx.x; row < span.end; row += kThreads) {
    if (!counts(p, row)) continue;
    total += static_cast<double>(p.logps[row]);
    count += 1.0;
  }
  total = block_sum(total, scratch);
  count = block_sum(count, scratch + kWarps);
  return {total, count};
}

// log σ(x), without overflow on either side.
__device__ __forceinline__ double log_sigmoid(double x) {
  return (x < 0.0 ? x : 0.0) - log1p(exp(-fabs(x)));
}

// σ(x), likewise.
__device__ __forceinline__ double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x < 0.0 ? e : 1.0) / (1.0 + e);
}

// A sequence's log-probability, rounded where the reference's is, to the sum and to the quotient:
// equal policy and reference then differ by exactly nothing. (fp64 rounds the quotient of two fp32
// numbers to what fp32 would.)
__device__ __forceinline__ float rounded_quotient(double sum, double count) {
  return static_cast<float>(static_cast<double>(static_cast<float>(sum)) / count);
}

struct Coefficients {
  float chosen;
  float rejected;
};

// By one thread: everything of a pair but its place in the mean.
__device__ __forceinline__ Coefficients finish_pair(const SequenceLossParams& p, int64_t pair,
                                                    int64_t chosen, int64_t rejected,
                                                    SequenceSum own, SequenceSum other) {
  const double own_count = p.average && own.count > 1.0 ? own.count : 1.0;
  const double other_count = p.average && other.count > 1.0 ? other.count : 1.0;
  const float own_logps = rounded_quotient(own.logps, own_count);
  const float other_logps = rounded_quotient(other.logps, other_count);
  const double own_reward = p.beta * (static_cast<double>(own_logps) - p.ref_logps[chosen]);
  const double other_reward = p.beta * (static_cast<double>(other_logps) - p.ref_logps[rejected]);
  const double margin = own_reward - other_reward;
  const double smooth = p.label_smoothing;
  // Without smoothing 0 · log σ(−∞) of an impossible rejected answer would be NaN.
  const double flipped = smooth > 0.0 ? smooth * log_sigmoid(-margin) : 0.0;
  p.pair_losses[pair] = -((1.0 - smooth) * log_sigmoid(margin) + flipped);
  const double slope = p.beta * (smooth - sigmoid(-margin)) / static_cast<double>(p.pairs);
  const Coefficients result{static_cast<float>(slope / own_count),
                            static_cast<float>(-slope / other_count)};
  p.sequence_logps[chosen] = own_logps;
  p.sequence_logps[rejected] = other_logps;
  p.rewards[chosen] = static_cast<float>(own_reward);
  p.rewards[rejected] = static_cast<float>(other_reward);
  p.coefficients[chosen] = result.chosen;
  p.coefficients[rejected] = result.rejected;
  return result;
}

// Rows before the first sequence and after the last one belong to none, and get zeros.
__device__ __forceinline__ void write_rows(const SequenceLossParams& p, Span span, float value) {
  constexpr int kAtOnce = 4;  // labels are read before the first coefficient is written
  for (int64_t first = span.begin + threadIdx.x; first < span.end; first += kAtOnce * kThreads) {
    bool carries[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t row = first + u * kThreads;
      carries[u] = row < span.end && counts(p, row);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t row = first + u * kThreads;
      if (row < span.end) p.row_coefficients[row] = carries[u] ? value : 0.0f;
    }
  }
}

}  // namespace sequence_loss

// Two blocks per multiprocessor are plenty, and saying so keeps ptxas from spilling to fit more.
__global__ void __launch_bounds__(kThreads, 2) sequence_loss_kernel(const SequenceLossParams p) {
  using namespace sequence_loss;
  FASTDPO_SHARED(double, scratch, 4 * kWarps);
  FASTDPO_SHARED(float, coefficient, 2);
  FASTDPO_SHARED(int, last, 1);
  const int64_t pair = blockIdx.x;
  const int64_t chosen = p.interleaved ? 2 * pair : pair;
  const int64_t rejected = p.interleaved ? chosen + 1 : chosen + p.pairs;
  const Span own = span_of(p, chosen), other = span_of(p, rejected);
  const SequenceSum own_sum = sum_sequence(p, own, scratch);
  const SequenceSum other_sum = sum_sequence(p, other, scratch + 2 * kWarps);
  if (threadIdx.x == 0) {
    const Coefficients result = finish_pair(p, pair, chosen, rejected, own_sum, other_sum);
    coefficient[0] = result.chosen;
    coefficient[1] = result.rejected;
    last[0] = last_to_arrive(p.counter, static_cast<unsigned>(p.pairs));
  }
  __syncthreads();
  if (p.row_coefficients != nullptr) {
    write_rows(p, own, coefficient[0]);
    write_rows(p, other, coefficient[1]);
    if (pair == 0) write_rows(p, {0, own.begin}, 0.0f);
    if (pair == p.pairs - 1) write_rows(p, {other.end, p.rows}, 0.0f);
  }
  if (!last[0]) return;
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < p.pairs; i += kThreads) total += __ldcg(p.pair_losses + i);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) *p.loss = static_cast<float>(total / static_cast<double>(p.pairs));
}

}  // namespace fastdpo
