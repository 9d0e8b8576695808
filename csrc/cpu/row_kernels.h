// The fused kernels over rows of logits, and a table of them for each instruction set, which operators.cpp calls. A
// kernel computes rows [begin, end), the share of one thread, and knows nothing of other threads. If rows are few and
// long, the threads share the columns of a row: each scans its columns [first, last), then the results are merged, and
// each goes on with its columns.
//
// Memory traffic for each logit, without accesses to the caches: cross_entropy reads it once, and writes the gradient
// if a call asks for it. Its backward reads it once and writes the gradient. log_softmax reads it once and writes once.
// Its backward reads input and the upstream gradient, and writes once. Class probabilities are read as often as logits.
// divergence reads logits and log q once, and writes the gradient if a call asks for it; its backward does the same.
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

// The numbers of transforms/inner.h. A scale of 0 says that there is no inner.
template <class S>
struct InnerNumbers {
  S scale, cap;

  bool present() const { return scale != 0; }
};

// y = f(inner(z)) / temperature: see composition.h.
template <class S>
struct Transform {
  std::string_view name;
  const S* coefficients;
  int64_t size;  // of a row of coefficients
  const double* constants;
  InnerNumbers<S> inner;
  S inverse_temperature;  // NaN if the temperature is not positive, so that all results are NaN
};

// The largest y of each row, and the sum of exp(y - largest): see OnlineSoftmax.
template <class S>
struct RowStats {
  S* largest;
  S* sum;
  // The third number, by the kernel that found it: the sum of the q of class probabilities; the
  // sum_j p_j (largest - y_j) of token statistics; the sum of row/divergence.h. Null for two numbers.
  S* third;
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
  RowStats<S> stats;
};

template <class S, class Target>
struct CrossEntropyBackwardCall {
  Rows<const void*> input;
  Target target;
  Transform<S> transform;
  S grad_of_every_loss;  // if grad_loss is null
  const S* grad_loss;
  const S* grad_lse;      // null: zero
  const S* grad_entropy;  // null: zero; needs the stats of token statistics
  RowStats<const S> stats;
  Rows<void*> grad_input;  // data null: not needed; may be the input
};

// The backward pass of `forward`.
template <class S, class Target>
CrossEntropyBackwardCall<S, Target> backward_of(const CrossEntropyCall<S, Target>& forward) {
  const RowStats<S>& stats = forward.stats;
  return {forward.input,     forward.target, forward.transform, forward.grad_loss,
          nullptr,           nullptr,        nullptr,           {stats.largest, stats.sum, stats.third},
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

// Sums over columns of the terms of row/divergence.h.
struct DivergenceSums {
  double loss = 0, gradient = 0;

  void merge(const DivergenceSums& part) {
    loss += part.loss;
    gradient += part.gradient;
  }
};

// A row of p, known from its stats: p = exp(y - largest) / sum.
template <class S>
struct Distribution {
  S largest, sum;
};

// What a divergence does with tiles of y and of log q: it knows no transform, so that all transforms share its code.
template <class S>
struct DivergenceTiles {
  DivergenceSums (*sums)(S beta, const Distribution<S>& p, const S* y, const S* log_q, int64_t n);
  // Writes `factor` times the term of the gradient.
  void (*gradients)(S beta, const Distribution<S>& p, const S* y, const S* log_q, int64_t n, S factor, S* to);
};

// The backward pass of log_softmax and of the divergences: dL/dy_j = part_j - of_p p_j. log_softmax has the upstream
// gradients as parts, and their sum is of_p. A divergence makes the parts from log q and p.
template <class S>
struct DenseBackwardCall {
  Rows<const void*> input;
  Rows<const void*> dense;               // the upstream gradients, or log q
  const DivergenceTiles<S>* divergence;  // null: log_softmax
  S beta;
  Transform<S> transform;
  RowStats<const S> stats;
  const double* grad_sum;  // log_softmax: of each row of upstream gradients
  S grad_of_every_loss;    // divergence: if grad_loss is null
  const S* grad_loss;
  Rows<void*> grad_input;  // data null: not needed; may be the input
};

template <class S>
struct DivergenceCall {
  DenseBackwardCall<S> backward;
  int64_t classes;
  S* loss;
  S* lse;
  RowStats<S> stats;
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
  OnlineSoftmax<S> (*softmax_scan)(const Rows<const void*>& input, const Transform<S>&, int64_t row, int64_t first,
                                   int64_t last);
  void (*log_softmax_finish)(const LogSoftmaxCall<S>&, int64_t row, const OnlineSoftmax<S>& whole, int64_t first,
                             int64_t last);
  double (*sum_of_row)(const Rows<const void*>&, int64_t row, int64_t first, int64_t last);
  void (*dense_backward)(const DenseBackwardCall<S>&, double* coefficients, int64_t begin, int64_t end, int64_t first,
                         int64_t last);
  DivergenceTiles<S> forward_kl, reverse_kl, jsd;
  void (*divergence)(const DivergenceCall<S>&, double* coefficients, int64_t begin, int64_t end);
  DivergenceSums (*divergence_scan)(const DivergenceCall<S>&, int64_t row, const OnlineSoftmax<S>& whole, int64_t first,
                                    int64_t last);
  void (*divergence_finish)(const DivergenceCall<S>&, int64_t row, const OnlineSoftmax<S>& whole,
                            const DivergenceSums& sums);

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
