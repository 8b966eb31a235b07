// IEEE half for the host: exact one way, rounded to nearest even the other, subnormals and
// infinities included.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u,
                 fraction = value.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(fraction | 0x400u),
                                                     static_cast<int>(exponent) - 25);
  return sign != 0 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (magnitude >= 65520.0f)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past the largest half
  if (magnitude == 0.0f) return {static_cast<uint16_t>(sign)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit =
      exponent - 11 < -24 ? -24 : exponent - 11;  // the last place of the result is 2^unit
  const auto steps = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // Steps carry into the exponent by themselves: 2048 of them are 1024 of the next.
  const unsigned bits = unit == -24 ? steps : (static_cast<unsigned>(unit + 24) << 10) + steps;
  return {static_cast<uint16_t>(sign | bits)};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
