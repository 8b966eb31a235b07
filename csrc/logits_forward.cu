#include "logits_forward.cuh"

#include "launch.h"
#include "ops.h"

namespace fastdpo {

int64_t logits_forward_splits(DType dtype, int64_t vocab) {
  return ceil_div(vocab * size_of(dtype), logits_forward::kStretchBytes);
}

void run_logits_forward(const LogitsForwardParams& params, DType dtype, int64_t rows, bool softcap,
                        cudaStream_t stream) {
  if (rows == 0) return;
  if (params.splits > 1 && params.counters != nullptr) {
    check_cuda(cudaMemsetAsync(params.counters, 0, rows * sizeof(unsigned), stream),
               "logits_forward: counters");
  }
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto* kernel = softcap ? logits_forward_kernel<T, true> : logits_forward_kernel<T, false>;
    launch("logits_forward", kernel, rows * params.splits, stream, params);
    if (params.splits == 1 || params.counters != nullptr) return;
    auto* combine =
        softcap ? logits_forward_combine_kernel<T, true> : logits_forward_combine_kernel<T, false>;
    launch("logits_forward: combine", combine, ceil_div(rows, kThreads), stream, params);
  });
}

}  // namespace fastdpo
