// A stand-in for the CUDA runtime that runs kernels on the CPU, for the tests: blocks one after
// another, the threads of a block as fibers. Only what csrc/ uses is here, so anything new fails to
// compile rather than to be tested wrongly. The executor is in ../executor.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define CUDART_VERSION 0

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// ---- Vector types, with the alignment of the real ones: UBSan reports a misaligned access.

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- Who and where a thread is

namespace host_cuda {

struct Place {
  dim3 thread, block, block_size, grid_size;
};
const Place& place();

void barrier();                                  // __syncthreads
void warp_barrier(unsigned mask);                // __syncwarp
void* lane_slot(unsigned lane);                  // of this warp, for the shuffle in progress
void shuffle_done();                             // the next shuffle uses the other set of slots
void poison_shared(void* memory, size_t bytes);  // at the block's first use of it
void run(unsigned blocks, unsigned threads, void (*body)(void*), void* argument);

}  // namespace host_cuda

#define threadIdx (::host_cuda::place().thread)
#define blockIdx (::host_cuda::place().block)
#define blockDim (::host_cuda::place().block_size)
#define gridDim (::host_cuda::place().grid_size)

// Blocks run one after another, so one static array serves them all. It is filled with NaNs before
// each block: what a block reads before it writes shows.
#define FASTDPO_SHARED(type, name, count) \
  static type name[count];                \
  ::host_cuda::poison_shared(name, sizeof(name))

inline void __syncthreads() { host_cuda::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { host_cuda::warp_barrier(mask); }
inline void __threadfence() {}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves 4 or 8 bytes");
  const unsigned lane = threadIdx.x % 32;
  memcpy(host_cuda::lane_slot(lane), &value, sizeof(T));
  host_cuda::warp_barrier(mask);
  const unsigned source = lane + delta < 32 ? lane + delta : lane;
  memcpy(&value, host_cuda::lane_slot(source), sizeof(T));
  host_cuda::shuffle_done();
  return value;
}

inline bool __any_sync(unsigned mask, bool predicate) {
  memcpy(host_cuda::lane_slot(threadIdx.x % 32), &predicate, sizeof(predicate));
  host_cuda::warp_barrier(mask);
  bool any = false;
  for (unsigned lane = 0; lane < 32; ++lane)
    any |= *static_cast<const bool*>(host_cuda::lane_slot(lane));
  host_cuda::shuffle_done();
  return any;
}

// ---- Memory

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}

// ---- Bits

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}

// ---- The runtime API

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);

namespace host_cuda {
cudaError_t begin_launch(dim3 grid, dim3 block);
cudaError_t end_launch();
// Hands a launch to whoever runs kernels instead; false: nobody does.
bool divert(const void* kernel, dim3 grid, dim3 block, const void* params, size_t bytes);
}  // namespace host_cuda

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments,
                             size_t, cudaStream_t) {
  if (const cudaError_t error = host_cuda::begin_launch(grid, block); error != cudaSuccess)
    return error;
  if (host_cuda::divert(reinterpret_cast<const void*>(kernel), grid, block, arguments[0],
                        sizeof(Params)))
    return host_cuda::end_launch();
  struct Call {
    void (*kernel)(Params);
    Params params;
  } call{kernel, *static_cast<Params*>(arguments[0])};
  host_cuda::run(
      grid.x, block.x,
      [](void* c) { static_cast<Call*>(c)->kernel(static_cast<Call*>(c)->params); }, &call);
  return host_cuda::end_launch();
}
