#include "target_logits.cuh"

#include "launch.h"
#include "ops.h"

namespace fastdpo {

void run_target_logits(const TargetLogitsParams& params, DType dtype, bool softcap,
                       cudaStream_t stream) {
  if (params.rows == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto* kernel = softcap ? target_logits_kernel<T, true> : target_logits_kernel<T, false>;
    launch("target_logits", kernel, ceil_div(params.rows, kWarps), stream, params);
  });
}

}  // namespace fastdpo
