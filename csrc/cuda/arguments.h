// The arguments of the kernels, in plain C++. Operators fill them in (operators.cpp), launchers pass them on.
#pragma once

#include <cstdint>

#include "../plif_grid.h"

namespace monosoftmax::cuda {

// The most threads of a block, and the fewest blocks with registers on a multiprocessor: so a thread has 128 registers.
// The copies of one block overlap with the arithmetic of the other, if shared memory has room for both. Without these
// bounds, the compiler spills a few registers to reach the next step of occupancy.
constexpr int kFewestBlocks = 2;
constexpr int kMostThreads = 256;

enum class ElementType { kFloat, kBFloat16, kHalf };

// inner(z) of transforms/inner.h, with the quotient scale / cap, so that no thread divides.
struct InnerArguments {
  bool present;  // false: inner(z) = z
  float scale, cap, within;
};

// y = f(inner(z)) / temperature, with the coefficients of f in torch's layout, [size] or [rows, size].
struct TransformArguments {
  const float* coefficients;
  int64_t size;
  double constants[3];
  const float* table;  // for look-ups in global memory, [entries, stride]; may be null
  InnerArguments inner{};
  const float* temperature = nullptr;  // on the device; null: 1
};

// The memory for the sums of the coefficients' gradient. Each block has its own set, or each warp with WarpSums. Or
// atomics add to one set for all, in float64: millions of float32 additions to one number would lose its last digits.
struct SumsArguments {
  float* partials;
  double* total;  // null if there are partials
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

  // losses: compute the losses. Otherwise read the row_stats (largest and sum) of an earlier call. return_lse: compute
  // the lse of ignored rows. Otherwise it is 0.
  bool losses, return_lse;
  float *loss, *lse, *largest, *sum;

  // The upstream gradients of the losses (stride 0: one for all losses) and of lse (null: 0). `factor` multiplies the
  // upstream gradients of the losses. With a factor, grad_input already holds the gradient for a factor of 1, so the
  // kernel does nothing if the factor is 1. Only the device knows its value.
  const float* grad_loss;
  int64_t grad_loss_stride;
  const float *grad_lse, *factor;
  void* grad_input;  // null: not needed; may be the input
  int64_t grad_stride;
  SumsArguments sums;

  // The offsets of the sums and of the row in the dynamic shared memory of a block. The coefficients come first.
  unsigned sums_offset, row_offset;
};

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
  float* row_stats;  // [3, rows]: largest, sum and gap (token_statistics.cuh)
};

// What the target of dense_targets.cuh is, and the loss.
enum class DenseLoss {
  kOfIndices,        // gradients only, with that of the entropy: a target of all classes with a single 1
  kOfProbabilities,  // cross entropy
  kForwardKl,        // the divergences of monosoftmax/row_kernels.py, of log q
  kReverseKl,
  kJsd,
};

struct DenseTargetArguments {
  const void* input;  // [rows, classes]
  int64_t stride, rows;
  int classes;
  TransformArguments transform;

  DenseLoss kind;
  const int64_t* indices;  // of kOfIndices, otherwise null
  int64_t ignore_index;
  const void* target;  // [rows, classes]
  ElementType target_type;
  int64_t target_stride;

  // As in CrossEntropyArguments, for kOfIndices and kOfProbabilities. beta is for kJsd.
  float label_smoothing, z_loss, beta;
  const float *weight, *weight_sum;

  // losses: compute the losses. Otherwise read the row_stats of an earlier call: [3, rows], largest, sum and a number
  // for the gradient.
  bool losses;
  float *loss, *lse, *row_stats;

  // As in CrossEntropyArguments. grad_entropy is for kOfIndices, and null means 0, as for grad_lse.
  const float* grad_loss;
  int64_t grad_loss_stride;
  const float *grad_lse, *grad_entropy, *factor;
  void* grad_input;  // null: not needed; may be the input
  int64_t grad_stride;
  bool gradients;  // of logits or coefficients
  SumsArguments sums;
  unsigned sums_offset;
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
