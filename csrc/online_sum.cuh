// Σ exp(z) over a stream of logits in one pass: the largest logit so far, and the sum relative to
// it.
#pragma once

#include "common.cuh"

namespace fastdpo {

struct OnlineSum {
  float top = -INFINITY;
  float sum = 0.0f;  // Σ exp(z − anchor())

  // Infinite tops are not subtracted (∞ − ∞), as torch.logsumexp does it: a row of −inf sums to log
  // 0 = −inf, a row with +inf to +inf. A NaN never becomes the top, and poisons the sum.
  __device__ __forceinline__ float anchor() const { return fabsf(top) == INFINITY ? 0.0f : top; }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount]) {
    float new_top = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) new_top = fmaxf(new_top, z[i]);
    const OnlineSum next{new_top};
    float terms[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) terms[i] = fast_exp(z[i] - next.anchor());
    sum = fmaf(sum, fast_exp(top - next.anchor()), tree_sum(terms));
    top = new_top;
  }

  __device__ __forceinline__ void add(const OnlineSum& other) {
    const OnlineSum next{fmaxf(top, other.top)};
    sum = sum * fast_exp(top - next.anchor()) + other.sum * fast_exp(other.top - next.anchor());
    top = next.top;
  }
};

// The combined sum in lane 0.
__device__ __forceinline__ OnlineSum warp_combine(OnlineSum value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    OnlineSum other;
    other.top = __shfl_down_sync(kAllLanes, value.top, offset);
    other.sum = __shfl_down_sync(kAllLanes, value.sum, offset);
    value.add(other);
  }
  return value;
}

// The combined sum in thread 0. `scratch` has 2 · kWarps entries.
__device__ __forceinline__ OnlineSum block_combine(OnlineSum value, float* scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  value = warp_combine(value);
  if (lane == 0) {
    scratch[warp] = value.top;
    scratch[kWarps + warp] = value.sum;
  }
  __syncthreads();
  if (warp == 0) {
    value = OnlineSum{};
    if (lane < kWarps) value = OnlineSum{scratch[lane], scratch[kWarps + lane]};
    value = warp_combine(value);
  }
  return value;
}

}  // namespace fastdpo
