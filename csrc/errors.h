// CUDA errors as exceptions that name the kernel; nothing ends the process.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastdpo {

class CudaError : public std::runtime_error {
 public:
  CudaError(const char* what, cudaError_t error)
      : std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error)) {}
};

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)
      cudaGetLastError();  // an error that has been reported is not reported again by a later call
  throw CudaError(what, error);
}

}  // namespace fastdpo
