// The 16-bit stand-ins' conversions, exported so that a test can hold them against PyTorch's.
#include "cuda_bf16.h"
#include "cuda_fp16.h"

extern "C" {
float host_cuda_half_to_float(unsigned bits) { return __half2float({static_cast<uint16_t>(bits)}); }
unsigned host_cuda_float_to_half(float value) { return __float2half_rn(value).bits; }
unsigned host_cuda_float_to_bfloat16(float value) { return __float2bfloat16_rn(value).bits; }
}
