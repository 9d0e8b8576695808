// The fused kernels over rows of logits, and the table through which the launcher (cross_entropy.cpp) reaches the build
// of them for an instruction set. Rows [begin, end) of a call are one thread's share; nothing here knows of threads.
//
// Memory traffic per logit: cross_entropy reads it once; its backward reads it once more and writes the gradient;
// log_softmax reads it twice and writes once; its backward reads input once and the upstream gradient twice.
// Arithmetic is in S: float for float, bfloat16 and half logits, double for double. Each result is rounded once.
#pragma once

#include <cstdint>
#include <string_view>

#include "../row/loss.h"

namespace monosoftmax::cpu {

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

// Rows of elements: any row stride, columns next to each other.
template <class Pointer>
struct Rows {
  Pointer data;
  Element element;
  int64_t stride;
};

template <class S>
struct Transform {
  std::string_view name;
  const S* coefficients;
  int64_t size;  // of a row of coefficients
  const double* constants;
};

// The largest y of each row, and the sum of exp(y - largest): see OnlineSoftmax.
template <class S>
struct RowStats {
  S* largest;
  S* sum;
};

// Where the gradients of the coefficients are summed: `copies` tables of `size` pieces with `rows` values each, so
// that successive logits of one piece do not wait for each other; for a vector, one copy of one row.
struct CoefficientGradient {
  double* sums;  // [copies, size, rows], or null where nobody needs it
  int copies;
};

template <class S>
struct CrossEntropyCall {
  Rows<const void*> input;
  const int64_t* target;
  Transform<S> transform;
  LossOptions<S> options;
  bool lse_of_ignored;
  S* loss;
  S* lse;
  RowStats<S> stats;
};

template <class S>
struct CrossEntropyBackwardCall {
  Rows<const void*> input;
  const int64_t* target;
  Transform<S> transform;
  LossOptions<S> options;
  const S* grad_loss;  // null: zero
  const S* grad_lse;   // null: zero
  RowStats<const S> stats;
  Rows<void*> grad_input;  // data null: not needed
};

template <class S>
struct LogSoftmaxCall {
  Rows<const void*> input;
  int64_t classes;
  Transform<S> transform;
  Rows<void*> output;
  RowStats<S> stats;
};

template <class S>
struct LogSoftmaxBackwardCall {
  Rows<const void*> grad_output;
  Rows<const void*> input;
  int64_t classes;
  Transform<S> transform;
  RowStats<const S> stats;
  Rows<void*> grad_input;  // data null: not needed
};

template <class S>
struct RowKernels {
  void (*cross_entropy)(const CrossEntropyCall<S>&, int64_t begin, int64_t end);
  void (*cross_entropy_backward)(const CrossEntropyBackwardCall<S>&, CoefficientGradient, int64_t begin, int64_t end);
  void (*log_softmax)(const LogSoftmaxCall<S>&, int64_t begin, int64_t end);
  void (*log_softmax_backward)(const LogSoftmaxBackwardCall<S>&, CoefficientGradient, int64_t begin, int64_t end);
};

struct InstructionSet {
  const char* name;
  RowKernels<float> float_kernels;
  RowKernels<double> double_kernels;
};

extern const InstructionSet kDefault;
#ifdef MONOSOFTMAX_X86
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace monosoftmax::cpu
