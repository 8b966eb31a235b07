// From what is stored to the logits of the model, and the derivative:
//
//     z = factor · t
//     with a softcap       t = tanh(pre · u)    factor = post    ∂z/∂u = gain · (1 − t²)
//     without one          t = u                factor = pre     ∂z/∂u = gain
#pragma once

#include "common.cuh"
#include "params.h"

namespace fastdpo {

// tanh.approx has a relative error of 2^-11, which would be 0.01 in a logit capped at 30. Here it
// is below 2^-21: a polynomial close to zero, one exponential and one reciprocal elsewhere.
constexpr float kTanhNear = 0.55f;

// x + x³ · P(x²), the minimax polynomial: 4e-8 and the roundings.
__device__ __forceinline__ float tanh_near(float x) {
  const float square = x * x;
  float p = fmaf(square, 0.01643758f, -0.052671813f);
  p = fmaf(p, square, 0.13320725f);
  p = fmaf(p, square, -0.33332947f);
  return fmaf(p * square, x, x);
}

// 1 − 2q / (1 + q) with q = e^(−2|x|).
__device__ __forceinline__ float tanh_far(float x) {
  const float twice = fast_exp2(fmaf(fabsf(x), -2.0f * kLog2e, 1.0f));  // 2q
  return copysignf(fmaf(-twice, fast_reciprocal(fmaf(twice, 0.5f, 1.0f)), 1.0f), x);
}

__device__ __forceinline__ float tanh_anywhere(float x) {
  return fabsf(x) < kTanhNear ? tanh_near(x) : tanh_far(x);
}

// The same for a vector. Called by all lanes of a warp: where all of their elements are close to
// zero, as most logits are under the caps of today's models, the other formula is skipped, which
// is a third of the arithmetic of a kernel that should wait for memory alone. An element's bits do
// not depend on it.
template <int kCount>
__device__ __forceinline__ void tanh_anywhere(float (&x)[kCount]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(x[i]));
  if (__any_sync(kAllLanes, largest >= kTanhNear)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = tanh_anywhere(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = tanh_near(x[i]);
  }
}

// u -> t, one element or, called by all lanes of a warp, a vector in place.
template <bool kSoftcap>
__device__ __forceinline__ float curve(const LogitMap& map, float u) {
  return kSoftcap ? tanh_anywhere(map.pre * u) : u;
}

template <bool kSoftcap, int kCount>
__device__ __forceinline__ void curve(const LogitMap& map, float (&u)[kCount]) {
  if constexpr (kSoftcap) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) u[i] *= map.pre;
    tanh_anywhere(u);
  }
}

template <bool kSoftcap>
__device__ __forceinline__ float factor(const LogitMap& map) {
  return kSoftcap ? map.post : map.pre;
}

template <bool kSoftcap>
__device__ __forceinline__ float map_logit(const LogitMap& map, float u) {
  return factor<kSoftcap>(map) * curve<kSoftcap>(map, u);
}

}  // namespace fastdpo
