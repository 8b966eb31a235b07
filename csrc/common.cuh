// What every kernel shares: element types, 16-byte access to rows at any element alignment,
// exponentials, reductions in a fixed order. Plain CUDA C++ with no tensor-core and no
// architecture-specific instruction but the guarded ex2 and rcp, so that tests/instruments/host
// runs the same code on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// Shared memory of a block. The host shim redefines it, to poison the memory before each block.
#ifndef FASTDPO_SHARED
#define FASTDPO_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace fastdpo {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;

// Elements of T in one 16-byte vector.
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- Element types: fp32, or two 16-bit elements to the 32-bit word. Arithmetic is fp32
// throughout.

template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr int per_word = 1;
  static __device__ __forceinline__ void unpack(uint32_t word, float* out) {
    out[0] = __uint_as_float(word);
  }
  static __device__ __forceinline__ uint32_t pack(const float* in) {
    return __float_as_uint(in[0]);
  }
  static __device__ __forceinline__ float load(const float* from) { return *from; }
  static __device__ __forceinline__ float from_float(float x) { return x; }
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr int per_word = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* out) {
    out[0] = __uint_as_float(word << 16);  // a bf16 is the upper half of the fp32 of the same value
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* in) {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(in[0], in[1]));
  }
  static __device__ __forceinline__ float load(const __nv_bfloat16* from) {
    return __bfloat162float(*from);
  }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
  }
};

template <>
struct Element<__half> {
  static constexpr int per_word = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* out) {
    const float2 pair = __half22float2(bit_cast<__half2>(word));
    out[0] = pair.x;
    out[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float* in) {
    return bit_cast<uint32_t>(__floats2half2_rn(in[0], in[1]));
  }
  static __device__ __forceinline__ float load(const __half* from) { return __half2float(*from); }
  static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
};

template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[kVector<T>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) Element<T>::unpack(words[w], out + w * Element<T>::per_word);
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&in)[kVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = Element<T>::pack(in + w * Element<T>::per_word);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- Rows

// Bytes [skew, skew + 16) of the 32 bytes (low, high); skew in [0, 16) and a multiple of 2.
__device__ __forceinline__ uint4 realign(const uint4& low, const uint4& high, unsigned skew) {
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = (skew & 8u) ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = (skew & 4u) ? w[i + 1] : w[i];
  const unsigned bits = (skew & 2u) * 8u;
  return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                    __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

// Reads a row of `length` elements in vectors whose first elements are congruent to `phase` modulo
// kVector<T>.
//
// Which thread gets which element never depends on where the row lies in memory: a row that starts
// between two 16-byte boundaries (every second row of an odd vocabulary, say) is read as the two
// aligned vectors that cover each of its own, the second of which is the next lane's first and so
// an L1 hit, and shifted together. That keeps sums, whose bits depend on their order, independent
// of the row's place in a batch. Only the vectors that overlap the row's ends are read element by
// element, because nothing outside the row is touched.
template <class T>
class RowReader {
 public:
  __device__ __forceinline__ RowReader(const T* row, int length, int phase = 0)
      : row_(row),
        length_(length),
        skew_(static_cast<unsigned>(reinterpret_cast<uintptr_t>(row) + phase * sizeof(T)) %
              kVectorBytes) {}

  // raw[u] = elements [first + u * step, + kVector<T>), those outside the row as zero bits; vectors
  // that start at or after `end` are not read. The loads of an aligned row are all issued before
  // the first one is used.
  template <int kCount>
  __device__ __forceinline__ void load(int first, int step, int end, uint4 (&raw)[kCount]) const {
    bool inner[kCount];
    const int before = static_cast<int>(skew_ / sizeof(T));
    const int after = skew_ == 0 ? kVector<T> : 2 * kVector<T> - before;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int at = first + u * step;
      inner[u] = at >= before && at <= length_ - after && at < end;
      raw[u] = make_uint4(0u, 0u, 0u, 0u);
    }
    if (skew_ == 0) {
#pragma unroll
      for (int u = 0; u < kCount; ++u)
        if (inner[u]) raw[u] = __ldcs(aligned(first + u * step, 0));
    } else {
      uint4 high[kCount];
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        high[u] = raw[u];
        if (inner[u]) {
          raw[u] = *aligned(first + u * step, before);
          high[u] = *aligned(first + u * step + kVector<T>, before);
        }
      }
#pragma unroll
      for (int u = 0; u < kCount; ++u) raw[u] = realign(raw[u], high[u], skew_);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int at = first + u * step;
      if (!inner[u] && at < end) raw[u] = edge(at);
    }
  }

 private:
  __device__ __forceinline__ const uint4* aligned(int at, int before) const {
    return reinterpret_cast<const uint4*>(row_ + (at - before));
  }

  __device__ __forceinline__ uint4 edge(int at) const {
    float values[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const int column = at + i;
      values[i] = column >= 0 && column < length_ ? Element<T>::load(row_ + column) : 0.0f;
    }
    return pack<T>(values);  // exact: each value came from a T
  }

  const T* row_;
  int length_;
  unsigned skew_;  // bytes by which the vectors lie past a 16-byte boundary
};

// ---- Exponentials

constexpr float kLog2e = 1.4426950408889634f;

// 2^x on the special function unit: a relative error of at most 2^-22, zero below 2^-126, ±inf and
// NaN as exp2f has them.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// e^x as 2^(x · log2 e): one multiplication more, and |x| · 2^-24 of error (the rounded exponent).
// Used where x is already the difference of two fp32 numbers, whose own rounding is the same, and
// the terms with a large |x| are the small ones.
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * kLog2e); }

// 1 / x for x in [1, 2]: one instruction, an error of at most one unit in the last place.
__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// Σ over a power of two of values, as a tree: short dependency chains, and a rounding error of
// log2(count) steps.
template <int kCount>
__device__ __forceinline__ float tree_sum(float (&values)[kCount]) {
  static_assert((kCount & (kCount - 1)) == 0, "a tree needs a power of two");
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}

// ---- Reductions: always the same tree, so always the same bits.

template <class T>
__device__ __forceinline__ T warp_sum(T value) {  // the total in lane 0
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(kAllLanes, value, offset);
  return value;
}

// The total in thread 0. `scratch` has kWarps entries and may be used again after the next barrier.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < kWarps ? scratch[lane] : T(0));
  return value;
}

// Called by one thread once its block's results are written: true for the last of `blocks` blocks,
// which may then read (with __ldcg) what all the others wrote. *counter starts at zero.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned blocks) {
  __threadfence();  // our results before our ticket
  const bool last = atomicAdd(counter, 1u) == blocks - 1;
  if (last) __threadfence();  // their tickets before their results
  return last;
}

}  // namespace fastdpo
