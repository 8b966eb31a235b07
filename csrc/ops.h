// The four ops, as the bindings call them: arguments checked, on the current device. Each queues
// its work on `stream` and returns without waiting.
#pragma once

#include "params.h"

namespace fastdpo {

// The number of blocks a row is split into: a function of the type and the vocabulary alone.
int64_t logits_logps_splits(DType dtype, int64_t vocab);
int64_t logits_logps_backward_splits(DType out_dtype, int64_t vocab, const void* out,
                                     int64_t out_stride);

void run_logits_logps(const LogitsLogpsParams& params, DType dtype, int64_t rows, bool softcap,
                      cudaStream_t stream);
void run_logits_logps_backward(const LogitsLogpsBackwardParams& params, DType dtype,
                               DType out_dtype, int64_t rows, bool softcap, cudaStream_t stream);
void run_target_logits(const TargetLogitsParams& params, DType dtype, bool softcap,
                       cudaStream_t stream);
void run_sequence_loss(const SequenceLossParams& params, cudaStream_t stream);

}  // namespace fastdpo
