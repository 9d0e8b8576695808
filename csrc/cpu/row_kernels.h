// The fused kernels over rows of logits, and a table of them for each instruction set, which operators.cpp calls. A
// kernel computes rows [begin, end), the share of one thread, and knows nothing of other threads. If rows are few and
// long, the threads share the columns of a row: each scans its columns [first, last), then the results are merged, and
// each goes on with its columns.
//
// Memory traffic for each logit, without accesses to the caches: cross_entropy reads it once, and writes the gradient
// if a call asks for it. Its backward reads it once and writes the gradient. log_softmax reads it once and writes once.
// Its backward reads input and the upstream gradient, and writes once. Class probabilities are read as often as logits.
// Arithmetic is in S: float for float, bfloat16 and half logits, double for double. Each result is rounded once.
#pragma once

#include <cstdint>
#include <string_view>

#include "../row/loss.h"
#include "../row/online_softmax.h"
#include "../row/probability_loss.h"

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
  S* mass;  // sum of the q of class probabilities; null for class indices
};

// The sums over the columns [first, last) of a row.
template <class S>
struct RowPart {
  OnlineSoftmax<S> softmax;
  S target_y = 0;       // 0 if the target is in another part
  double weighted = 0;  // sum of w_j y_j, if labels are smoothed

  void merge(const RowPart& part) {
    softmax.merge(part.softmax);
    target_y += part.target_y;
    weighted += part.weighted;
  }
};

// A target of class indices, with the options of its loss.
template <class S>
struct IndexTarget {
  using Part = RowPart<S>;

  const int64_t* index;
  LossOptions<S> options;
  bool lse_of_ignored;

  bool ignores(int64_t row) const { return index[row] == options.ignore_index; }
  // Whether a row needs any computation.
  bool counts(int64_t row) const { return lse_of_ignored || !ignores(row); }
};

// A target of class probabilities, of the shape of the logits, with the options of its loss.
template <class S>
struct ProbabilityTarget {
  using Part = ProbabilityPart<S>;

  Rows<const void*> rows;
  ProbabilityOptions<S> options;

  bool counts(int64_t) const { return true; }
};

template <class S, class Target>
struct CrossEntropyCall {
  Rows<const void*> input;
  Target target;
  Transform<S> transform;
  S* loss;
  S* lse;
  RowStats<S> stats;
  S grad_loss;             // upstream gradient of every loss, for the gradient of input and of the coefficients
  Rows<void*> grad_input;  // data null: not needed; may be the input
};

template <class S>
struct TokenStatisticsCall {
  Rows<const void*> input;
  const int64_t* target;
  int64_t classes, ignore_index;
  Transform<S> transform;
  S* log_prob;
  S* entropy;
  int64_t* argmax;
  S* lse;
  int64_t* rank;
};

template <class S, class Target>
struct CrossEntropyBackwardCall {
  Rows<const void*> input;
  Target target;
  Transform<S> transform;
  S grad_of_every_loss;  // if grad_loss is null
  const S* grad_loss;
  const S* grad_lse;  // null: zero
  RowStats<const S> stats;
  Rows<void*> grad_input;  // data null: not needed; may be the input
};

// The backward pass of `forward`.
template <class S, class Target>
CrossEntropyBackwardCall<S, Target> backward_of(const CrossEntropyCall<S, Target>& forward) {
  const RowStats<S>& stats = forward.stats;
  return {forward.input,
          forward.target,
          forward.transform,
          forward.grad_loss,
          nullptr,
          nullptr,
          {stats.largest, stats.sum, stats.mass},
          forward.grad_input};
}

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
  const double* grad_sum;  // of each row of grad_output
  Rows<void*> grad_input;  // data null: not needed
};

// The gradients of the coefficients are added to `coefficients`, in the layout of the coefficients. It may be null.
template <class S, class Target>
struct LossKernels {
  using Call = CrossEntropyCall<S, Target>;
  using Part = typename Target::Part;

  void (*cross_entropy)(const Call&, double* coefficients, int64_t begin, int64_t end);
  Part (*scan)(const Call&, int64_t row, int64_t first, int64_t last);
  void (*finish)(const Call&, int64_t row, const Part& whole);
  void (*backward)(const CrossEntropyBackwardCall<S, Target>&, double* coefficients, int64_t begin, int64_t end,
                   int64_t first, int64_t last);
};

template <class S>
struct RowKernels {
  LossKernels<S, IndexTarget<S>> of_indices;
  LossKernels<S, ProbabilityTarget<S>> of_probabilities;
  void (*token_statistics)(const TokenStatisticsCall<S>&, int64_t begin, int64_t end);
  void (*log_softmax)(const LogSoftmaxCall<S>&, int64_t begin, int64_t end);
  OnlineSoftmax<S> (*log_softmax_scan)(const LogSoftmaxCall<S>&, int64_t row, int64_t first, int64_t last);
  void (*log_softmax_finish)(const LogSoftmaxCall<S>&, int64_t row, const OnlineSoftmax<S>& whole, int64_t first,
                             int64_t last);
  double (*sum_of_row)(const Rows<const void*>&, int64_t row, int64_t first, int64_t last);
  void (*log_softmax_backward)(const LogSoftmaxBackwardCall<S>&, double* coefficients, int64_t begin, int64_t end,
                               int64_t first, int64_t last);

  const LossKernels<S, IndexTarget<S>>& of(const IndexTarget<S>&) const { return of_indices; }
  const LossKernels<S, ProbabilityTarget<S>>& of(const ProbabilityTarget<S>&) const { return of_probabilities; }
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
