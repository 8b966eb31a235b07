#include "logits_logps.cuh"

#include "launch.h"
#include "ops.h"

namespace fastdpo {

int64_t logits_logps_splits(DType dtype, int64_t vocab) {
  return ceil_div(vocab * size_of(dtype), logits_logps::kStretchBytes);
}

void run_logits_logps(const LogitsLogpsParams& params, DType dtype, int64_t rows, bool softcap,
                      cudaStream_t stream) {
  if (rows == 0) return;
  if (params.splits > 1 && params.counters != nullptr) {
    check_cuda(cudaMemsetAsync(params.counters, 0, rows * sizeof(unsigned), stream),
               "logits_logps: counters");
  }
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto* kernel = softcap ? logits_logps_kernel<T, true> : logits_logps_kernel<T, false>;
    launch("logits_logps", kernel, rows * params.splits, stream, params);
    if (params.splits == 1 || params.counters != nullptr) return;
    auto* combine =
        softcap ? logits_logps_combine_kernel<T, true> : logits_logps_combine_kernel<T, false>;
    launch("logits_logps: combine", combine, ceil_div(rows, kThreads), stream, params);
  });
}

}  // namespace fastdpo
