// The gradient of the labels' log-probabilities with respect to materialized logits:
//
//     out_tv = grad_t · gain · d_tv · (1[v = y_t] − exp(z_tv − lse_t))          in place or not
//
// Bytes moved: rows that carry loss × V × 2 · sizeof(T), one read and one write; the other rows × V
// × sizeof(T), written as zeros without being read; about 32 per block. Nothing is summed, so every
// element's bits depend on its row alone.
#pragma once

#include <type_traits>

#include "logit_map.cuh"

namespace fastdpo {

namespace logits_logps_backward {

constexpr int kLoads = 4;
constexpr int kStretchBytes = 64 << 10;  // of `out`, written by one block

template <class T>
constexpr int kColumns = kStretchBytes / static_cast<int>(sizeof(T));

struct RowGradient {
  float scale;  // grad_t · gain
  float top;    // the largest logit, and log Σ exp(z − that)
  float log_sum;
  int label;  // -1 where it is outside the vocabulary

  // t as `curve` gives it. z is rounded before anything is taken from it, as the forward rounded
  // it, and the largest logit goes first: that is exact where z is close to it.
  template <bool kSoftcap>
  __device__ __forceinline__ float operator()(const LogitMap& map, float t, int column) const {
    const float probability = fast_exp((factor<kSoftcap>(map) * t - top) - log_sum);
    const float slope = column == label ? 1.0f - probability : -probability;
    return kSoftcap ? scale * slope * fmaf(-t, t, 1.0f) : scale * slope;
  }
};

// The vectors of a row lie on 16-byte boundaries of `out`, the first and last of them possibly
// across its ends.
template <class T>
__device__ __forceinline__ void store_vector(T* row, int at, int vocab,
                                             const float (&values)[kVector<T>]) {
  if (at >= 0 && at <= vocab - kVector<T>) {
    __stcs(reinterpret_cast<uint4*>(row + at), pack<T>(values));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (at + i >= 0 && at + i < vocab) row[at + i] = Element<T>::from_float(values[i]);
  }
}

template <class T>
__device__ __forceinline__ int columns_past_boundary(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T));
}

template <class T>
__device__ __forceinline__ void write_zeros(T* row, int begin, int end, int vocab) {
  const float zeros[kVector<T>] = {};
  for (int at = begin + static_cast<int>(threadIdx.x) * kVector<T>; at < end;
       at += kThreads * kVector<T>) {
    store_vector(row, at, vocab, zeros);
  }
}

// In place, a thread reads what it alone writes: the vectors of `logits` are then those of `out`,
// and aligned.
template <class T, bool kSoftcap>
__device__ __forceinline__ void write_same_type(const T* logits, T* out, int begin, int end,
                                                int vocab, const RowGradient& gradient,
                                                const LogitMap& map) {
  constexpr int kStep = kThreads * kVector<T>;
  const RowReader<T> reader(logits, vocab, begin);
#pragma unroll 1
  for (int base = begin; base < end; base += kLoads * kStep) {
    const int first = base + static_cast<int>(threadIdx.x) * kVector<T>;
    uint4 raw[kLoads];
    reader.load(first, kStep, end, raw);
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (base + u * kStep >= end) break;  // whole blocks: `curve` is for whole warps
      const int at = first + u * kStep;
      float values[kVector<T>];
      unpack<T>(raw[u], values);
      curve<kSoftcap>(map, values);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        values[i] = gradient.template operator()<kSoftcap>(map, values[i], at + i);
      }
      if (at < end) store_vector(out, at, vocab, values);
    }
  }
}

}  // namespace logits_logps_backward

// One block per (row, stretch of out), stretches of a row next to each other.
template <class In, class Out, bool kSoftcap>
__global__ void __launch_bounds__(kThreads)
    logits_logps_backward_kernel(const LogitsLogpsBackwardParams p) {
  using namespace logits_logps_backward;
  const int64_t row = blockIdx.x / static_cast<unsigned>(p.splits);
  const int split = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.splits));
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride;
  // Columns are counted from the 16-byte boundary at or before the row's first element.
  const int shift = columns_past_boundary(out);
  const int begin = split * kColumns<Out> - shift;
  const int end = p.vocab - begin < kColumns<Out> ? p.vocab : begin + kColumns<Out>;
  const int64_t label = p.labels[row];
  if (label < 0) return write_zeros(out, begin, end, p.vocab);

  const In* logits = static_cast<const In*>(p.logits) + row * p.row_stride;
  const float grad = p.grad[row * p.grad_stride] * (p.grad_scale == nullptr ? 1.0f : *p.grad_scale);
  const RowGradient gradient{grad * p.map.gain, p.lse[2 * row], p.lse[2 * row + 1],
                             label < p.vocab ? static_cast<int>(label) : -1};
  if constexpr (std::is_same_v<In, Out>) {
    write_same_type<In, kSoftcap>(logits, out, begin, end, p.vocab, gradient, p.map);
  } else {
    // Two types in one step are rare (fp32 gradients of 16-bit logits): one element at a time,
    // coalesced.
    for (int at = (begin < 0 ? 0 : begin) + static_cast<int>(threadIdx.x); at < end;
         at += kThreads) {
      const float t = curve<kSoftcap>(p.map, Element<In>::load(logits + at));
      out[at] = Element<Out>::from_float(gradient.template operator()<kSoftcap>(p.map, t, at));
    }
  }
}

}  // namespace fastdpo
