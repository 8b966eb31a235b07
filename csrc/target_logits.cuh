// The label's own logit: a_t = softcap(scale · (hidden_t · weight_{y_t} + bias_{y_t})) /
// temperature.
//
// Bytes moved: rows × D × 2 · sizeof(T), read once (a label that repeats hits in L2). One warp per
// row, its products and sums in fp32 and always in the same order, whatever the number of rows.
#pragma once

#include "logit_map.cuh"

namespace fastdpo {

namespace target_logits {

constexpr int kLoads = 2;  // vectors in flight per lane, of each operand

__device__ __forceinline__ float load_bias(const void* bias, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kBFloat16:
      return Element<__nv_bfloat16>::load(static_cast<const __nv_bfloat16*>(bias) + at);
    case DType::kFloat16: return Element<__half>::load(static_cast<const __half*>(bias) + at);
    default: return static_cast<const float*>(bias)[at];
  }
}

// This lane's share of hidden · weight.
template <class T>
__device__ __forceinline__ float dot_share(const T* hidden, const T* weight, int width) {
  constexpr int kStep = kWarp * kVector<T>;
  const RowReader<T> hidden_reader(hidden, width), weight_reader(weight, width);
  const int lane_first = static_cast<int>(threadIdx.x % kWarp) * kVector<T>;
  float total = 0.0f;
#pragma unroll 1
  for (int base = 0; base < width; base += kLoads * kStep) {
    uint4 h[kLoads], w[kLoads];
    hidden_reader.load(base + lane_first, kStep, width, h);
    weight_reader.load(base + lane_first, kStep, width, w);
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      float x[kVector<T>], y[kVector<T>];
      unpack<T>(h[u], x);
      unpack<T>(w[u], y);  // beyond the row both are zero
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) x[i] *= y[i];
      total += tree_sum(x);
    }
  }
  return total;
}

}  // namespace target_logits

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) target_logits_kernel(const TargetLogitsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;  // whole warps
  const int64_t label = p.labels[row];
  if (label < 0 || label >= p.vocab) {
    if (threadIdx.x % kWarp == 0) p.out[row] = NAN;
    return;
  }
  const T* hidden = static_cast<const T*>(p.hidden) + row * p.hidden_stride;
  const T* weight = static_cast<const T*>(p.weight) + label * p.weight_stride;
  float total = warp_sum(target_logits::dot_share(hidden, weight, p.width));
  if (threadIdx.x % kWarp != 0) return;
  if (p.bias != nullptr) total += target_logits::load_bias(p.bias, p.bias_dtype, label);
  p.out[row] = map_logit<kSoftcap>(p.map, total);
}

}  // namespace fastdpo
