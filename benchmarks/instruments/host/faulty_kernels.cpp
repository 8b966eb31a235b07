// Kernels that are wrong on purpose. The executor must notice each of them, or its silence about
// the right ones means nothing.
#include "cuda_runtime.h"

namespace {

struct Out {
  unsigned* values;
};

// Missing barrier: reads a neighbour's entry that may not be written yet.
void race_kernel(Out p) {
  FASTDPO_SHARED(unsigned, shared, 64);
  shared[threadIdx.x] = threadIdx.x + 1;
  p.values[blockIdx.x * 64 + threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

// The same with its barrier.
void synchronised_kernel(Out p) {
  FASTDPO_SHARED(unsigned, shared, 64);
  shared[threadIdx.x] = threadIdx.x + 1;
  __syncthreads();
  p.values[blockIdx.x * 64 + threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

// Reads shared memory that nobody of this block has written.
void uninitialised_kernel(Out p) {
  FASTDPO_SHARED(unsigned, shared, 64);
  if (blockIdx.x == 0) shared[threadIdx.x] = 0;
  __syncthreads();
  p.values[blockIdx.x * 64 + threadIdx.x] = shared[threadIdx.x];
}

// The order of the blocks decides the result.
void ordered_kernel(Out p) { p.values[0] = p.values[0] * 3 + blockIdx.x; }

// Half of the threads never come.
void divergent_barrier_kernel(Out) {
  if (threadIdx.x < 32) __syncthreads();
}

void divergent_shuffle_kernel(Out p) {
  if (threadIdx.x % 2 == 0) p.values[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1u, 1);
}

// Right: each lane gets the lane above it, the last one itself, twice in a row.
void shuffle_kernel(Out p) {
  unsigned value = threadIdx.x;
  for (int i = 0; i < 2; ++i) value = __shfl_down_sync(0xffffffffu, value, 1);
  p.values[blockIdx.x * 64 + threadIdx.x] = value;
}

void beyond_shared_kernel(Out p) {
  FASTDPO_SHARED(unsigned, shared, 8);
  volatile unsigned at = threadIdx.x == 0 ? 8 : threadIdx.x % 8;
  shared[at] = 1;
  p.values[0] = shared[0];
}

void (*const kKernels[])(Out) = {race_kernel,    synchronised_kernel,      uninitialised_kernel,
                                 ordered_kernel, divergent_barrier_kernel, divergent_shuffle_kernel,
                                 shuffle_kernel, beyond_shared_kernel};

}  // namespace

// Runs 3 blocks of 64 threads; values has 192 entries. Returns the CUDA error.
extern "C" int host_cuda_run_faulty(int which, unsigned* values) {
  Out out{values};
  void* arguments[] = {&out};
  const cudaError_t error =
      cudaLaunchKernel(kKernels[which], dim3(3), dim3(64), arguments, 0, nullptr);
  (void)cudaGetLastError();
  return error;
}
