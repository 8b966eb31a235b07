#include "sequence_loss.cuh"

#include "launch.h"
#include "ops.h"

namespace fastdpo {

void run_sequence_loss(const SequenceLossParams& params, cudaStream_t stream) {
  const char* name = "sequence_loss";
  if (params.pairs == 0) {  // nothing to take the mean of: a loss of zero that moves nothing
    check_cuda(cudaMemsetAsync(params.loss, 0, sizeof(float), stream), name);
    if (params.row_coefficients != nullptr && params.rows > 0) {
      check_cuda(cudaMemsetAsync(params.row_coefficients, 0, params.rows * sizeof(float), stream),
                 name);
    }
    return;
  }
  check_cuda(cudaMemsetAsync(params.counter, 0, sizeof(unsigned), stream), name);
  launch(name, sequence_loss_kernel, params.pairs, stream, params);
}

}  // namespace fastdpo
