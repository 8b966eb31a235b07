// What each kernel is given: one struct per op, passed by value. Pointers are to device memory,
// strides count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastdpo {

// The tags by which callers name an element type.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Without a softcap z = pre · u with pre = scale / temperature. With one, z = post · tanh(pre · u)
// with pre = scale / cap and post = cap / temperature. `gain` = scale / temperature is ∂z/∂u
// without the cap's factor.
struct LogitMap {
  float pre;
  float post;
  float gain;
};

struct LogitsLogpsParams {
  const void* logits;     // [rows, vocab], row_stride apart
  const int64_t* labels;  // [rows]; negative: no loss, not read; ≥ vocab: NaN
  float* logps;           // [rows]
  float* lse;             // [rows, 2]: the largest logit, and log Σ exp(z − that)
  unsigned* counters;     // [rows], zero; null: partials are combined by a launch of their own
  float2* partials;       // [rows, splits]; unused where splits = 1
  int64_t rows;
  int64_t row_stride;  // elements
  int vocab;
  int splits;
  LogitMap map;
};

struct LogitsLogpsBackwardParams {
  const void* logits;     // [rows, vocab], row_stride apart
  void* out;              // [rows, vocab], out_stride apart; may be `logits` itself
  const int64_t* labels;  // [rows]; negative: zeros
  const float* lse;       // [rows, 2], of logits_logps
  const float* grad;      // [rows], grad_stride apart (0: the same for all)
  const float*
      grad_scale;      // [1], multiplies `grad`, on the device so that nobody waits for it; null: 1
  int64_t row_stride;  // elements
  int64_t out_stride;  // elements
  int64_t grad_stride;  // elements
  int vocab;
  int splits;
  LogitMap map;
};

struct TargetLogitsParams {
  const void* hidden;     // [rows, width], hidden_stride apart
  const void* weight;     // [vocab, width], weight_stride apart, the type of hidden
  const void* bias;       // [vocab] of bias_dtype, or null
  const int64_t* labels;  // [rows]; outside [0, vocab): NaN, not read
  float* out;             // [rows]
  int64_t hidden_stride;  // elements
  int64_t weight_stride;  // elements
  int64_t rows;
  int64_t vocab;
  int width;
  DType bias_dtype;
  LogitMap map;
};

struct SequenceLossParams {
  const float* logps;       // [rows]
  const int64_t* labels;    // [rows], negative: the row does not count; null: all rows count
  const int64_t* offsets;   // [2 · pairs + 1]; sequence s owns rows [offsets[s], offsets[s + 1])
  const float* ref_logps;   // [2 · pairs]
  float* loss;              // [1]
  float* sequence_logps;    // [2 · pairs]
  float* rewards;           // [2 · pairs]
  float* coefficients;      // [2 · pairs]
  float* row_coefficients;  // [rows], or null: the sequence's coefficient, 0 where the row does not
                            // count
  unsigned* counter;        // [1], zero
  double* pair_losses;      // [pairs]
  int64_t rows;
  int64_t pairs;
  double beta;
  double label_smoothing;
  bool average;
  bool interleaved;  // chosen, rejected, chosen, …; otherwise all the chosen first
};

}  // namespace fastdpo
