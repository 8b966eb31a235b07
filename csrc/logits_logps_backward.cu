#include "logits_logps_backward.cuh"

#include "launch.h"
#include "ops.h"

namespace fastdpo {

int64_t logits_logps_backward_splits(DType out_dtype, int64_t vocab, const void* out,
                                     int64_t out_stride) {
  const int64_t size = size_of(out_dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 &&
                       out_stride % (kVectorBytes / size) == 0;
  // Stretches begin at a 16-byte boundary at or before the row: leave room for the furthest.
  const int64_t before = aligned ? 0 : kVectorBytes - size;
  return ceil_div(vocab * size + before, logits_logps_backward::kStretchBytes);
}

void run_logits_logps_backward(const LogitsLogpsBackwardParams& params, DType dtype,
                               DType out_dtype, int64_t rows, bool softcap, cudaStream_t stream) {
  if (rows == 0) return;
  with_type(dtype, [&](auto in) {
    using In = decltype(in);
    with_type(out_dtype, [&](auto out) {
      using Out = decltype(out);
      auto* kernel = softcap ? logits_logps_backward_kernel<In, Out, true>
                             : logits_logps_backward_kernel<In, Out, false>;
      launch("logits_logps_backward", kernel, rows * params.splits, stream, params);
    });
  });
}

}  // namespace fastdpo
