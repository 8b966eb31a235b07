// Host side of every op: type dispatch, launches, and CUDA errors as exceptions that name the
// kernel.
#pragma once

#include <stdexcept>
#include <string>

#include "common.cuh"
#include "params.h"

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

template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, cudaStream_t stream,
            Params params) {
  void* arguments[] = {&params};
  check_cuda(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                              arguments, 0, stream),
             name);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Calls body(T{}) with the element type of a tag that the bindings have checked.
template <class Body>
auto with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16: return body(__nv_bfloat16{});
    case DType::kFloat16: return body(__half{});
    default: return body(float{});
  }
}

}  // namespace fastdpo
