// The arguments of the kernels, in plain C++: the operators fill them in (operators.cpp), the launchers pass them on.
#pragma once

#include <cstdint>

#include "../plif_grid.h"

namespace monosoftmax::cuda {

// Threads of a block, and blocks that a multiprocessor has registers for: 128 for a thread. Two blocks overlap the
// copies of one with the arithmetic of the other, where shared memory has room for both. Left to itself, the compiler
// spills a few registers to come down to the next step of occupancy.
constexpr int kFewestBlocks = 2;
constexpr int kMostThreads = 256;

// A transform: its coefficients as torch has them, [size] or [rows, size].
struct TransformArguments {
  const float* coefficients;
  int64_t size;
  double constants[3];
  const float* table;  // for look-ups in global memory, [entries, stride]; else null
};

// Where the sums for the gradient of the coefficients go: a set for each block, or of WarpSums for each warp; or one
// set for all that atomics add to, in float64. Millions of float32 additions to one number would lose its last digits.
struct SumsArguments {
  float* partials;
  double* total;  // null where there are partials
};

struct CrossEntropyArguments {
  const void* input;  // [rows, classes]
  int64_t stride, rows;
  int classes;
  const int64_t* target;
  TransformArguments transform;

  // As in LossOptions; weight_sum is null for weights of 1.
  int64_t ignore_index;
  float label_smoothing, z_loss;
  const float *weight, *weight_sum;

  // Whether losses are computed; otherwise they have been, and row_stats (largest and sum) are read. The lse of an
  // ignored row is computed where return_lse, else it is 0.
  bool losses, return_lse;
  float *loss, *lse, *largest, *sum;

  // Upstream gradients: of the losses, one for all where the stride is 0, and of lse (null: 0). A factor multiplies the
  // former. It comes with a grad_input that holds the gradient for a factor of 1 already, so that nothing is done where
  // it is 1. Only the device knows.
  const float* grad_loss;
  int64_t grad_loss_stride;
  const float *grad_lse, *factor;
  void* grad_input;  // null: not needed; may be the input
  int64_t grad_stride;
  SumsArguments sums;

  // Where in the dynamic shared memory of a block the sums and the row begin; the coefficients come first.
  unsigned sums_offset, row_offset;
};

enum class ElementType { kFloat, kBFloat16, kHalf };

struct LogSoftmaxArguments {
  const void* input;  // [rows, classes]
  int64_t stride, rows;
  int classes;
  TransformArguments transform;
  void* output;
  ElementType output_type;
  int64_t output_stride;
  float *largest, *sum;
};

struct LogSoftmaxBackwardArguments {
  const void* grad_output;  // [rows, classes]
  ElementType grad_output_type;
  int64_t grad_output_stride;
  const void* input;
  int64_t stride, rows;
  int classes;
  TransformArguments transform;
  const float *largest, *sum;
  void* grad_input;  // null: not needed
  int64_t grad_stride;
  SumsArguments sums;
  unsigned sums_offset;
};

struct TokenStatisticsArguments {
  const void* input;  // [rows, classes]
  int64_t stride, rows;
  int classes;
  const int64_t* target;
  TransformArguments transform;
  int64_t ignore_index;
  float *log_prob, *entropy, *lse;
  int64_t *argmax, *rank;
};

// The coefficients of a PLIF, or the gradient of its raw slopes.
struct PlifArguments {
  PlifGrid grid;
  float min_slope, scale;  // scale: 1 - min_slope, rounded once
  const float* raw_slope;  // [K]
  float* coefficients;     // [2, K]
  const float* grad_coefficients;
  float* grad_raw_slope;
};

}  // namespace monosoftmax::cuda
