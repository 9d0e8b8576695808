// The loss of rows of logits for a target of all classes, and its gradient with respect to logits and coefficients.
//
//   kind              loss of a row                                                    dL/dy_j
//   kOfIndices        none: the loss is that of cross_entropy.cuh                      as below, with t_j = [j = t]
//   kOfProbabilities  sum_j q_j (lse - y_j) + z lse^2, q_j = ((1 - eps) t_j + eps/V) w_j
//                                                                     g (Q p_j - q_j) + (2 z lse g + h) p_j - e p_j
//                                                                     (log p_j + H)
//   kForwardKl        sum_j q_j (log q_j - log p_j)                                    g (Q p_j - q_j)
//   kReverseKl        R = sum_j p_j (log p_j - log q_j)                                g p_j (log p_j - log q_j - R)
//   kJsd              beta sum_j q_j (log q_j - log m_j) + (1 - beta) R,               g (1 - beta) p_j (log p_j - log
//   m_j - R)
//                     R = sum_j p_j (log p_j - log m_j), m = beta q + (1 - beta) p
//
// p = softmax(y), y = f(inner(z)) / temperature; Q = sum_j q_j, lse = logsumexp(y); g, h and e are the upstream
// gradients of the loss, of lse and of the entropy H. A divergence takes log q, the others t. The kind and the type of
// the target are arguments of one kernel: the kinds differ in a few instructions for each logit, and a kernel for each
// would take the compiler seven times as long.
//
// row_stats are the largest y, the sum of exp(y - largest y), and a third number: of kOfIndices the gap M of
// token_statistics.cuh, with which log p_j + H = (y_j - largest y) + M; Q of kOfProbabilities and kForwardKl; R of the
// others, in units of ln 2, as all logarithms here.
//
// Memory traffic for each class. With the losses: two reads of a logit and one of the target, of which the second read
// of the logit may come from the L2 cache. For gradients: one more read of both, and a write. kOfIndices has no target
// in memory.
//
// Numerics: scan.cuh, composition.cuh. log p_j is (y_j - largest y) - log(sum). A term whose first factor is 0 is 0,
// also where its logarithm is infinite. log m_j is never formed: log(p / m) and log(q / m) come from log(p / q), of
// which only a power between 0 and 1 is taken, so that nothing overflows, and both are 0 to rounding where p = q. p is
// e / sum to rounding, and parts of a gradient that cancel where p is next to 1 are subtracted from each other first.
//
// Hazards: grad_input may be input, since a thread only writes elements that no other thread reads. An ignored row may
// hold anything: unless lse or the entropy have a gradient, it is not read. An index that is no class makes the
// gradient of its row NaN.
#pragma once

#include "coefficient_sums.cuh"
#include "other_row.cuh"
#include "scan.cuh"
#include "transform.cuh"

namespace monosoftmax::cuda {

// The row_stats of a row.
struct DenseStats {
  float largest, sum, third;
};

// log2(p / m) and log2(q / m), m = beta q + (1 - beta) p. The larger of p and q is never far from m.
struct BesideMixture {
  float of_p, of_q;

  // ratio: log2(p / q).
  __device__ __forceinline__ BesideMixture(float ratio, float beta) {
    const float smaller = exp2_approximate(-fabsf(ratio)), rest = 1 - beta;
    const bool p_is_smaller = ratio <= 0;
    const float of_larger =
        -log2_approximate(p_is_smaller ? __fmaf_rn(rest, smaller, beta) : __fmaf_rn(beta, smaller, rest));
    of_p = p_is_smaller ? of_larger + ratio : of_larger;
    of_q = p_is_smaller ? of_larger : of_larger - ratio;
  }
};

// The target of a row.
class DenseTarget {
 public:
  __device__ DenseTarget(const DenseTargetArguments& arguments, int64_t row)
      : arguments_(arguments),
        target_(arguments.target, arguments.target_type, row * arguments.target_stride),
        ignored_(false),
        index_(-1) {
    if (arguments.kind != DenseLoss::kOfIndices) return;
    const int64_t index = arguments.indices[row];
    ignored_ = index == arguments.ignore_index;
    if (index >= 0 && index < arguments.classes) index_ = static_cast<int>(index);
  }

  __device__ bool ignored() const { return ignored_; }
  // False for an index that is no class.
  __device__ bool valid() const { return arguments_.kind != DenseLoss::kOfIndices || ignored_ || index_ >= 0; }
  // Whether the target is log q.
  __device__ __forceinline__ bool is_logarithm() const { return arguments_.kind >= DenseLoss::kForwardKl; }
  // Q of kOfIndices.
  __device__ float mass() const {
    const float weight_sum = arguments_.weight_sum == nullptr ? arguments_.classes : *arguments_.weight_sum;
    const float weight = index_ < 0 || arguments_.weight == nullptr ? 1 : arguments_.weight[index_];
    return __fmaf_rn(spread(), weight_sum, kept() * weight);
  }

  // q of kCount classes from a column on, or log2 q.
  template <int kCount>
  __device__ __forceinline__ void load(int column, float (&q)[kCount]) const {
    if (arguments_.kind == DenseLoss::kOfIndices) {
      MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) q[i] = index_ - column == i ? 1 : 0;
    } else {
      target_.load(column, q);
    }
    if (is_logarithm()) {
      MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) q[i] *= kLog2E;
      return;
    }
    const float kept = this->kept(), spread = this->spread();
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) q[i] = __fmaf_rn(kept, q[i], spread);
    if (arguments_.weight != nullptr) {
      MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) q[i] *= __ldg(arguments_.weight + column + i);
    }
  }

 private:
  // q = (kept t + spread) w
  __device__ __forceinline__ float kept() const { return 1 - arguments_.label_smoothing; }
  __device__ __forceinline__ float spread() const {
    return arguments_.label_smoothing / static_cast<float>(arguments_.classes);
  }

  const DenseTargetArguments& arguments_;
  OtherRow target_;
  bool ignored_;
  int index_;
};

// The sums over classes that make the loss of a row.
class DenseSums {
 public:
  __device__ DenseSums(const DenseTargetArguments& arguments, float sum)
      : arguments_(arguments), log2_sum_(sum == 0 ? NAN : log2f(sum)), inverse_(sum == 0 ? NAN : 1 / sum) {}

  // Adds the class of a gap; q as the target loads it.
  __device__ __forceinline__ void add(float gap, float q) {
    const float log2_p = gap - log2_sum_;
    if (arguments_.kind == DenseLoss::kOfProbabilities) {
      add_product(sums[0], q, -log2_p);
      sums[1] += q;
    } else if (arguments_.kind == DenseLoss::kForwardKl) {
      const float mass = exp2_approximate(q);
      add_product(sums[0], mass, q - log2_p);
      sums[1] += mass;
    } else {
      const float p = exp2_approximate(gap) * inverse_, ratio = log2_p - q;
      if (arguments_.kind == DenseLoss::kReverseKl) {
        add_product(sums[0], p, ratio);
      } else {
        const BesideMixture beside(ratio, arguments_.beta);
        add_product(sums[0], exp2_approximate(q), beside.of_q);
        add_product(sums[1], p, beside.of_p);
      }
    }
  }
  __device__ float loss(float lse) const {
    float loss = sums[0] * kLn2;
    if (arguments_.kind == DenseLoss::kJsd) {
      loss = __fmaf_rn(arguments_.beta, sums[0], (1 - arguments_.beta) * sums[1]) * kLn2;
    }
    return arguments_.z_loss > 0 ? __fmaf_rn(arguments_.z_loss * lse, lse, loss) : loss;
  }
  __device__ float third() const { return arguments_.kind == DenseLoss::kReverseKl ? sums[0] : sums[1]; }
  __device__ float log2_sum() const { return log2_sum_; }

  // The third one is not used: the memory of a scan reduces three.
  float sums[3] = {0, 0, 0};

 private:
  static __device__ __forceinline__ void add_product(float& sum, float factor, float logarithm) {
    sum = factor == 0 ? sum : __fmaf_rn(factor, logarithm, sum);
  }

  const DenseTargetArguments& arguments_;
  float log2_sum_, inverse_;
};

// Scans a row, and sums up its loss. The first thread writes the results.
template <class T, class F, class E>
__device__ DenseStats dense_loss(const Composed<F>& f, const DenseTargetArguments& arguments, int64_t row,
                                 const RowInMemory<E>& logits, const DenseTarget& target, const Team& team,
                                 ScanMemory& memory) {
  constexpr int kElements = Chunk<E>::kElements;
  const RowLayout<E>& layout = logits.layout;
  const RowScan scan = scan_once<T, false>(f, {nullptr, 0}, logits, team, -1, memory);
  const float shift = f.shift_of(scan.largest);
  DenseSums sums(arguments, scan.sum);
  for (int c = team.thread; c < layout.chunks(); c += team.threads) {
    float arguments_of_f[kElements], q[kElements];
    f.unpack(logits.chunk(c, 0), arguments_of_f);
    target.load(layout.column_of_chunk(c), q);
    for_each_group<T>(arguments_of_f, [&](T z, int i) {
      const T value = f.function.value(z);
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) sums.add(f.gap(value.of[j], shift), q[i + j]);
    });
  }
  for (int e = team.thread; e < layout.edges(); e += team.threads) {
    float q[1];
    target.load(layout.column_of_edge(e), q);
    sums.add(f.gap(f.template of_logit<T>(logits.edge(e)), shift), q[0]);
  }
  // The memory still holds the sums of the scan, which other threads may be reading.
  __syncthreads();
  reduce<Sum>(sums.sums, memory.sums);
  if (team.thread == 0) {
    const float lse = scan.sum == 0 ? -INFINITY : __fmaf_rn(sums.log2_sum(), kLn2, scan.largest);
    arguments.loss[row] = sums.loss(lse);
    arguments.lse[row] = lse;
    arguments.row_stats[row] = scan.largest;
    arguments.row_stats[arguments.rows + row] = scan.sum;
    arguments.row_stats[2 * arguments.rows + row] = sums.third();
  }
  return {scan.largest, scan.sum, sums.third()};
}

// dL/df of a row, f being y times the temperature.
class DenseGradient {
 public:
  template <class F>
  __device__ DenseGradient(const DenseTargetArguments& arguments, int64_t row, const DenseTarget& target,
                           const Composed<F>& f, float factor, const DenseStats& stats)
      : shift(f.shift_of(stats.largest)),
        kind_(arguments.kind),
        beta_(arguments.beta),
        sum_(stats.sum),
        third_(arguments.kind == DenseLoss::kOfIndices ? stats.third * kLog2E : stats.third) {
    const float inverse_temperature = f.inverse_temperature();
    const auto of_row = [&](const float* gradients) {
      return gradients == nullptr ? 0 : gradients[row] * inverse_temperature;
    };
    of_loss_ =
        target.ignored() ? 0 : arguments.grad_loss[row * arguments.grad_loss_stride] * factor * inverse_temperature;
    // A row of -inf only has no p: its gradient is NaN, as its loss is.
    inverse_ = sum_ == 0 || !target.valid() ? NAN : 1 / sum_;
    log2_sum_ = log2f(sum_);
    of_p_ = of_loss_ * (kind_ == DenseLoss::kOfIndices ? target.mass() : third_);
    of_gap_ = of_row(arguments.grad_entropy) * -kLn2;
    extra_ = of_row(arguments.grad_lse);
    if (arguments.z_loss > 0) {
      const float lse = __fmaf_rn(log2_sum_, kLn2, stats.largest);
      extra_ = __fmaf_rn(2 * arguments.z_loss * lse, of_loss_, extra_);
    }
    of_ratio_ = of_loss_ * kLn2 * (kind_ == DenseLoss::kJsd ? 1 - beta_ : 1);
  }

  // dL/df_j; q as the target loads it.
  __device__ __forceinline__ float of_class(float gap, float q) const {
    const float e = exp2_approximate(gap), near = e * inverse_;
    const float p = __fmaf_rn(__fmaf_rn(-near, sum_, e), inverse_, near);  // e / sum, to rounding
    if (kind_ <= DenseLoss::kForwardKl) {
      const float mass = kind_ == DenseLoss::kForwardKl ? exp2_approximate(q) : q;
      const float extra = __fmaf_rn(of_gap_, fmaxf(gap, kFarGap) + third_, extra_);
      return __fmaf_rn(p, extra, __fmaf_rn(p, of_p_, -(of_loss_ * mass)));
    }
    float ratio = (gap - log2_sum_) - q;
    if (kind_ == DenseLoss::kJsd) ratio = BesideMixture(ratio, beta_).of_p;
    return p == 0 ? 0 : of_ratio_ * p * (ratio - third_);
  }

  float shift;

 private:
  DenseLoss kind_;
  float beta_, sum_, third_, inverse_, log2_sum_, of_loss_, of_p_, of_gap_, extra_, of_ratio_;
};

// Where the gradient of a row goes.
template <class E>
struct GradientRow {
  E* row;  // null: it is not needed
  bool aligned;

  __device__ GradientRow(void* gradients, int64_t offset, const E* logits)
      : row(gradients == nullptr ? nullptr : static_cast<E*>(gradients) + offset),
        aligned(equally_aligned<E>(logits, row)) {}
};

template <class T, class F, class Sums, class E>
__device__ void dense_differentiate(const Composed<F>& f, const RowInMemory<E>& logits, const DenseTarget& target,
                                    const Team& team, const DenseGradient& gradient, const GradientRow<E>& to,
                                    Sums& sums) {
  constexpr int kElements = Chunk<E>::kElements;
  const RowLayout<E>& layout = logits.layout;
  const int lane = threadIdx.x % kWarp;
  // As in cross_entropy.cuh, WarpSums need whole warps: all lanes go on as long as one of them has a chunk.
  for (int c = team.thread; (Sums::kWarpWide ? c - lane : c) < layout.chunks(); c += team.threads) {
    const bool here = !Sums::kWarpWide || c < layout.chunks();
    const int column = layout.column_of_chunk(c);
    Chunk<E> chunk = here ? logits.chunk(c, 0) : Chunk<E>::lowest();
    if constexpr (Sums::kNeeded) chunk = chunk.larger(Chunk<E>::lowest());
    float numbers[kElements], q[kElements] = {};
    f.unpack(chunk, numbers);
    if (here) target.load(column, q);
    for_each_group<T>(numbers, [&](T z, int i) {
      const auto point = f.function.at(z);
      T df;
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
        df.of[j] = gradient.of_class(f.gap(point.value.of[j], gradient.shift), q[i + j]);
      }
      if (Sums::kWarpWide && !here) df = T(0);
      sums.add(f.function, point, z, df);
      const T dz = df * point.derivative;
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) numbers[i + j] = dz.of[j];
    });
    if (here) f.chain(numbers, [&] { return logits.chunk_again(c, 0); });
    if (to.row != nullptr && here) store_chunk(to.row + column, numbers, to.aligned);
  }
  for (int edge = team.thread; (Sums::kWarpWide ? edge - lane : edge) < layout.edges(); edge += team.threads) {
    const bool here = !Sums::kWarpWide || edge < layout.edges();
    const int column = here ? layout.column_of_edge(edge) : 0;
    float logit = here ? logits.edge(edge) : 0, q[1] = {0};
    if constexpr (Sums::kNeeded) logit = fmaxf(logit, lowest_logit<E>());
    if (here) target.load(column, q);
    const auto [argument, slope] = f.argument(logit);
    const T z(argument);
    const auto point = f.function.at(z);
    T df(0);
    if (here) df.of[0] = gradient.of_class(f.gap(point.value.of[0], gradient.shift), q[0]);
    sums.add(f.function, point, z, df);
    if (to.row != nullptr && here) store_element(to.row + column, df.of[0] * point.derivative.of[0] * slope);
  }
}

template <class Transform, class T, class Sums, class E>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    dense_target_kernel(const DenseTargetArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  const float factor = arguments.factor == nullptr ? 1 : *arguments.factor;
  if (arguments.factor != nullptr && factor == 1) return;
  const auto f = load_composed<Transform>(arguments.transform, shared);
  Sums sums(arguments.sums, arguments.transform, shared + arguments.sums_offset);
  const Team team;
  for (int64_t row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const E* of_row = static_cast<const E*>(arguments.input) + row * arguments.stride;
    const RowLayout<E> layout(of_row, arguments.classes, -1);
    const RowInMemory<E> logits{of_row, layout};
    const DenseTarget target(arguments, row);
    const float* given = arguments.row_stats + row;
    const DenseStats stats = arguments.losses ? dense_loss<T>(f, arguments, row, logits, target, team, memory[0])
                                              : DenseStats{given[0], given[arguments.rows], given[2 * arguments.rows]};
    if (!arguments.gradients) continue;
    const GradientRow<E> to(arguments.grad_input, row * arguments.grad_stride, of_row);
    const auto is_there = [&](const float* gradients) { return gradients != nullptr && gradients[row] != 0; };
    if (!target.ignored() || is_there(arguments.grad_lse) || is_there(arguments.grad_entropy)) {
      const DenseGradient gradient(arguments, row, target, f, factor, stats);
      dense_differentiate<T>(f, logits, target, team, gradient, to, sums);
    } else if (to.row != nullptr) {
      fill_with_zeros(layout, team, to.row, to.aligned);
    }
  }
  sums.finish();
}

}  // namespace monosoftmax::cuda
