// From what is stored to the logits of the model: z = softcap(scale · u) / temperature, and its
// derivative.
#pragma once

#include "common.cuh"
#include "params.h"

namespace fastdpo {

// tanhf, not tanh.approx: the latter's relative error of 2^-11 would be 0.01 in a logit capped
// at 30.
template <bool kSoftcap>
__device__ __forceinline__ float map_logit(const LogitMap& map, float u) {
  return kSoftcap ? map.post * tanhf(map.pre * u) : map.pre * u;
}

// Also d = 1 − tanh², so that ∂z/∂u = gain · d; d = 1 without a softcap.
template <bool kSoftcap>
__device__ __forceinline__ float map_logit(const LogitMap& map, float u, float& derivative) {
  if (!kSoftcap) {
    derivative = 1.0f;
    return map.pre * u;
  }
  const float t = tanhf(map.pre * u);
  derivative = fmaf(-t, t, 1.0f);
  return map.post * t;
}

}  // namespace fastdpo
