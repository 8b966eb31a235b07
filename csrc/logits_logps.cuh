// logps and log-sum-exps of the labels of rows of materialized logits.
//
// Bytes moved: rows that carry loss × V × sizeof(T), read once; 20 per row for label and results,
// and 32 per block for the label's own logit and the partial sum. Rows with a negative label are
// not read.
//
// A row is split into stretches of kStretchBytes, one block each: a function of V and the type
// alone, whatever the number of rows, so that a row's bits do not depend on the batch. The last
// block of a row to finish combines the row's partial sums, or a second launch does, always in the
// order of the columns: the bits are the same. (Unmeasured: last-block-done is the default because
// the combination is a few loads by one thread, hidden under other blocks' reading;
// `python -m benchmarks.kernels` times both. Thread block clusters would need sm_90.)
#pragma once

#include "logit_map.cuh"
#include "online_sum.cuh"

namespace fastdpo {

namespace logits_logps {

constexpr int kLoads = 4;  // vectors in flight per thread
constexpr int kStretchBytes =
    64 << 10;  // read by one block: four rounds of 256 threads × 4 vectors

template <class T>
constexpr int kColumns = kStretchBytes / static_cast<int>(sizeof(T));

template <class T, bool kSoftcap, bool kMasked>
__device__ __forceinline__ void add_vectors(OnlineSum& total, const uint4 (&raw)[kLoads], int first,
                                            int step, int end, const LogitMap& map) {
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    float z[kVector<T>];
    unpack<T>(raw[u], z);
    curve<kSoftcap>(map, z);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      z[i] *= factor<kSoftcap>(map);
      if (kMasked && first + u * step + i >= end) z[i] = -INFINITY;
    }
    total.add(z);
  }
}

template <class T, bool kSoftcap>
__device__ __forceinline__ OnlineSum sum_stretch(const T* row, int begin, int end, int vocab,
                                                 const LogitMap& map) {
  constexpr int kStep = kThreads * kVector<T>;
  const RowReader<T> reader(row, vocab);
  OnlineSum total;
#pragma unroll 1
  for (int base = begin; base < end; base += kLoads * kStep) {
    const int first = base + static_cast<int>(threadIdx.x) * kVector<T>;
    uint4 raw[kLoads];
    reader.load(first, kStep, end, raw);
    if (base + kLoads * kStep <= end) {
      add_vectors<T, kSoftcap, false>(total, raw, first, kStep, end, map);
    } else {
      add_vectors<T, kSoftcap, true>(total, raw, first, kStep, end, map);
    }
  }
  return total;
}

// By one thread. The label's own logit is read only now, so that no block waits for it first.
template <class T, bool kSoftcap>
__device__ __forceinline__ void write_row(const LogitsLogpsParams& p, int64_t row, const T* logits,
                                          int64_t label, const OnlineSum& total) {
  // A label outside the vocabulary is loud, and never read.
  const float own =
      label < p.vocab ? map_logit<kSoftcap>(p.map, Element<T>::load(logits + label)) : NAN;
  // (own − top) − log Σ, and not own − lse: the difference of two large numbers is taken where it
  // is exact.
  const float log_sum = logf(total.sum);
  p.logps[row] = (own - total.anchor()) - log_sum;
  p.lse[2 * row] = total.anchor();
  p.lse[2 * row + 1] = log_sum;
}

// Likewise, once all blocks of the row have left their partial sums.
template <class T, bool kSoftcap>
__device__ __forceinline__ void combine_row(const LogitsLogpsParams& p, int64_t row,
                                            const T* logits, int64_t label) {
  OnlineSum total;
  for (int i = 0; i < p.splits; ++i) {
    const float2 partial = __ldcg(p.partials + row * p.splits + i);
    total.add(OnlineSum{partial.x, partial.y});
  }
  write_row<T, kSoftcap>(p, row, logits, label, total);
}

}  // namespace logits_logps

// One block per (row, stretch), stretches of a row next to each other.
template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) logits_logps_kernel(const LogitsLogpsParams p) {
  using namespace logits_logps;
  FASTDPO_SHARED(float, scratch, 2 * kWarps);
  const int64_t row = blockIdx.x / static_cast<unsigned>(p.splits);
  const int split = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.splits));
  const int64_t label = p.labels[row];
  if (label < 0) {
    if (split == 0 && threadIdx.x == 0) p.logps[row] = p.lse[2 * row] = p.lse[2 * row + 1] = 0.0f;
    return;
  }
  const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
  const int begin = split * kColumns<T>;
  const int end = p.vocab - begin < kColumns<T> ? p.vocab : begin + kColumns<T>;
  OnlineSum total = sum_stretch<T, kSoftcap>(logits, begin, end, p.vocab, p.map);
  total = block_combine(total, scratch);
  if (threadIdx.x != 0) return;
  if (p.splits == 1) return write_row<T, kSoftcap>(p, row, logits, label, total);

  p.partials[row * p.splits + split] = make_float2(total.top, total.sum);
  if (p.counters == nullptr) return;
  if (!last_to_arrive(p.counters + row, static_cast<unsigned>(p.splits))) return;
  combine_row<T, kSoftcap>(p, row, logits, label);
}

// The second launch: one thread per row.
template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) logits_logps_combine_kernel(const LogitsLogpsParams p) {
  using namespace logits_logps;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t label = p.labels[row];
  if (label < 0) return;  // the first launch has written its zeros
  combine_row<T, kSoftcap>(p, row, static_cast<const T*>(p.logits) + row * p.row_stride, label);
}

}  // namespace fastdpo
