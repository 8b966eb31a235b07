// Host side of every op: type dispatch, launches, and CUDA errors as exceptions that name the
// kernel.
#pragma once

#include "common.cuh"
#include "errors.h"
#include "params.h"

namespace fastdpo {

template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, cudaStream_t stream,
            Params params) {
  void* arguments[] = {&params};
  check_cuda(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                              arguments, 0, stream),
             name);
}

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
