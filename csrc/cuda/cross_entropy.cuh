// The loss of rows of logits, and its gradient with respect to logits and coefficients.
//
//   cross_entropy_kernel           losses. Each row is read once.
//   cross_entropy_gradient_kernel  losses and gradients. If kResident, the row is read once and kept in the shared
//                                  memory of a block, or of the blocks of a cluster, and its gradient is written once.
//                                  Otherwise the row is read once for the loss, and once more for the gradient, from
//                                  the L2 cache if it is still there. Without the losses, the gradient takes the
//                                  row_stats of an earlier call, and only this second read.
//
// With a gradient of the entropy, the kernel of dense_targets.cuh takes the place of the second one.
//
// Numerics: scan.cuh; composition.cuh for inner and the temperature. Hazards: grad_input may be input, since a thread
// only writes elements that no other thread reads. Rows that are ignored may hold anything: they are not read. A target
// that is no class makes the loss and the gradient of its row NaN.
#pragma once

#include "../row/loss.h"
#include "coefficient_sums.cuh"
#include "scan.cuh"
#include "transform.cuh"

namespace monosoftmax::cuda {

// The target of a row, and the loss for this target and the options.
class RowTarget {
 public:
  __device__ RowTarget(const CrossEntropyArguments& arguments, int64_t row)
      : column_(arguments.target[row]),
        ignored_(column_ == arguments.ignore_index),
        valid_(column_ >= 0 && column_ < arguments.classes),
        loss_({arguments.classes, arguments.ignore_index, arguments.label_smoothing, arguments.z_loss, arguments.weight,
               arguments.weight_sum == nullptr ? arguments.classes : *arguments.weight_sum},
              valid_ ? column_ : 0) {}
  __device__ bool ignored() const { return ignored_; }
  __device__ bool valid() const { return valid_; }
  // -1 if there is none.
  __device__ int column() const { return valid_ ? static_cast<int>(column_) : -1; }
  __device__ const RowLoss<float, float>& loss() const { return loss_; }

 private:
  int64_t column_;
  bool ignored_, valid_;
  RowLoss<float, float> loss_;
};

// Smoothed labels have their own copy of the loop: in a common loop they would cost all other losses a third of their
// instructions.
template <class T, class F, class E>
__device__ RowScan scan_for_loss(const Composed<F>& f, const CrossEntropyArguments& arguments,
                                 const RowInMemory<E>& row, const Team& team, const RowTarget& target,
                                 ScanMemory& memory) {
  const ClassWeights weights{arguments.weight,
                             arguments.weight_sum == nullptr ? arguments.classes : *arguments.weight_sum};
  return arguments.label_smoothing > 0 ? scan_once<T, true>(f, weights, row, team, target.column(), memory)
                                       : scan_once<T, false>(f, weights, row, team, target.column(), memory);
}

__device__ inline void write_results(const CrossEntropyArguments& arguments, int64_t row, const RowTarget& target,
                                     const RowScan& scan) {
  const float log_sum = scan.sum == 0 ? NAN : log2f(scan.sum) * kLn2;
  const float lse = scan.sum == 0 ? -INFINITY : scan.largest + log_sum;
  const float loss = target.loss().loss(scan.gap * kLn2, scan.gaps * kLn2, log_sum, lse);
  arguments.loss[row] = target.ignored() ? 0 : target.valid() ? loss : NAN;
  arguments.lse[row] = lse;
  arguments.largest[row] = scan.largest;
  arguments.sum[row] = scan.sum;
}

// The results of an ignored row without return_lse.
__device__ inline void write_nothing(const CrossEntropyArguments& arguments, int64_t row) {
  arguments.loss[row] = arguments.lse[row] = arguments.largest[row] = arguments.sum[row] = 0;
}

// dL/df of a row: of_target() at the target, fma(e, spread, -of_weight) elsewhere. f is y times the temperature.
class GradientOfF {
 public:
  template <class F>
  __device__ GradientOfF(const CrossEntropyArguments& arguments, int64_t row, const RowTarget& target,
                         const Composed<F>& f, float factor, const RowScan& scan)
      : shift(f.shift_of(scan.largest)), sum_(scan.sum) {
    const float sum = scan.sum, inverse = f.inverse_temperature();
    const float grad_loss =
        target.ignored() ? 0 : arguments.grad_loss[row * arguments.grad_loss_stride] * factor * inverse;
    const float grad_lse = arguments.grad_lse == nullptr ? 0 : arguments.grad_lse[row] * inverse;
    const auto of = target.loss().gradient(grad_loss, grad_lse, scan.largest, sum);
    // A row of -inf only has no p: its gradient is NaN, as its loss is.
    inverse_ = sum == 0 || !(target.valid() || target.ignored()) ? NAN : 1 / sum;
    of_p_ = of.of_p;
    of_target_ = of.of_target;
    extra_ = of.extra_of_p;
    of_weight = of.of_weight;
    spread = (of_p_ + extra_) * inverse_;
  }
  // dL/df at the target, from its e and weight. The parts that cancel if p is next to 1 are subtracted from each other
  // first.
  __device__ __forceinline__ float of_target(float e, float weight) const {
    const float near = e * inverse_;
    const float p = __fmaf_rn(__fmaf_rn(-near, sum_, e), inverse_, near);  // e / sum, to rounding
    return __fmaf_rn(p, extra_, __fmaf_rn(p, of_p_, -__fmaf_rn(of_weight, weight, of_target_)));
  }

  float shift, spread, of_weight;

 private:
  float sum_, inverse_, of_p_, of_target_, extra_;
};

// Writes the gradient of a row, unless grad_row is null, and adds to the sums. With class weights and smoothed labels,
// all elements of the row must be edges.
template <class T, class F, class Sums, class E, class Row>
__device__ void differentiate(const Composed<F>& f, const CrossEntropyArguments& arguments, const Row& row,
                              const RowLayout<E>& layout, const Team& team, const RowTarget& target,
                              const GradientOfF& gradient, E* grad_row, bool aligned, Sums& sums) {
  constexpr int kElements = Chunk<E>::kElements;
  const int lane = threadIdx.x % kWarp;
  // WarpSums need whole warps: all lanes go on as long as one of them has a chunk.
  for (int c = team.thread, k = 0; (Sums::kWarpWide ? c - lane : c) < layout.chunks(); c += team.threads, ++k) {
    const bool here = !Sums::kWarpWide || c < layout.chunks();
    Chunk<E> chunk = here ? row.chunk(c, k) : Chunk<E>::lowest();
    if constexpr (Sums::kNeeded) chunk = chunk.larger(Chunk<E>::lowest());
    float arguments_of_f[kElements], grad[kElements];
    f.unpack(chunk, arguments_of_f);
    const int column = layout.column_of_chunk(c);
    for_each_group<T>(arguments_of_f, [&](T z, int i) {
      const auto point = f.function.at(z);
      const T e = f.exponential(point.value, gradient.shift);
      T df = Arithmetic<T>::fma(e, T(gradient.spread), T(-gradient.of_weight));
      if (Sums::kWarpWide && !here) df = T(0);
      sums.add(f.function, point, z, df);
      const T dz = df * point.derivative;
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) grad[i + j] = dz.of[j];
    });
    if (here) f.chain(grad, [&] { return row.chunk_again(c, k); });
    if (grad_row != nullptr && here) store_chunk(grad_row + column, grad, aligned);
  }
  for (int edge = team.thread; (Sums::kWarpWide ? edge - lane : edge) < layout.edges(); edge += team.threads) {
    const bool here = !Sums::kWarpWide || edge < layout.edges();
    const int column = here ? layout.column_of_edge(edge) : 0;
    float logit = here ? row.edge(edge) : 0;
    if constexpr (Sums::kNeeded) logit = fmaxf(logit, lowest_logit<E>());
    const auto [argument, slope] = f.argument(logit);
    const T z(argument);
    const auto point = f.function.at(z);
    const float e = f.exponential(point.value, gradient.shift).of[0];
    const float weight = gradient.of_weight != 0 && arguments.weight != nullptr ? arguments.weight[column] : 1;
    T df(0);
    if (here) {
      df.of[0] = column == target.column() ? gradient.of_target(e, weight)
                                           : __fmaf_rn(e, gradient.spread, -(gradient.of_weight * weight));
    }
    sums.add(f.function, point, z, df);
    if (grad_row != nullptr && here) store_element(grad_row + column, df.of[0] * point.derivative.of[0] * slope);
  }
}

template <class Transform, class T, class E>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    cross_entropy_kernel(const CrossEntropyArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  const auto f = load_composed<Transform>(arguments.transform, shared);
  const Team team;
  for (int64_t row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const RowTarget target(arguments, row);
    if (target.ignored() && !arguments.return_lse) {
      if (team.thread == 0) write_nothing(arguments, row);
      continue;
    }
    const E* logits = static_cast<const E*>(arguments.input) + row * arguments.stride;
    const RowLayout<E> layout(logits, arguments.classes, target.column());
    const RowScan scan = scan_for_loss<T>(f, arguments, RowInMemory<E>{logits, layout}, team, target, memory[0]);
    if (team.thread == 0) write_results(arguments, row, target, scan);
  }
}

template <class Transform, class T, class Sums, class E, bool kResident>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    cross_entropy_gradient_kernel(const CrossEntropyArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  const float factor = arguments.factor == nullptr ? 1 : *arguments.factor;
  if (arguments.factor != nullptr && factor == 1) return;
  const auto f = load_composed<Transform>(arguments.transform, shared);
  Sums sums(arguments.sums, arguments.transform, shared + arguments.sums_offset);
  const Team team;
  // A block must have started before other blocks write to its shared memory.
  if (kResident && Cluster::blocks() > 1) Cluster::sync();
  const bool by_elements = arguments.weight != nullptr && arguments.label_smoothing > 0;
  for (int64_t row = blockIdx.x / Cluster::blocks(); row < arguments.rows; row += gridDim.x / Cluster::blocks()) {
    const E* logits = static_cast<const E*>(arguments.input) + row * arguments.stride;
    E* grad_row =
        arguments.grad_input == nullptr ? nullptr : static_cast<E*>(arguments.grad_input) + row * arguments.grad_stride;
    const bool aligned = equally_aligned<E>(logits, grad_row);
    const RowTarget target(arguments, row);
    const RowLayout<E> layout(logits, arguments.classes, target.column(), kResident || !by_elements);
    const RowInMemory<E> in_memory{logits, layout};
    const bool scanned = arguments.losses && (!target.ignored() || arguments.return_lse);
    if (arguments.losses && !scanned && team.thread == 0) write_nothing(arguments, row);
    const bool present = !target.ignored() || (arguments.grad_lse != nullptr && arguments.grad_lse[row] != 0);
    const auto go_on = [&](const auto& row_of_logits, const RowScan& scan) {
      if (!present) return;
      const GradientOfF gradient(arguments, row, target, f, factor, scan);
      differentiate<T>(f, arguments, row_of_logits, layout, team, target, gradient, grad_row, aligned, sums);
    };
    if constexpr (kResident) {
      if (scanned) {
        const ResidentRow<E> resident(in_memory, team, shared + arguments.row_offset);
        const RowScan scan =
            scan_resident<T>(f, resident, layout, team, target.column(), arguments.label_smoothing > 0, memory[0]);
        if (team.thread == 0) write_results(arguments, row, target, scan);
        go_on(resident, scan);
      }
    } else {
      RowScan scan{};
      if (scanned) {
        scan = scan_for_loss<T>(f, arguments, in_memory, team, target, memory[0]);
        if (team.thread == 0) write_results(arguments, row, target, scan);
      } else if (!arguments.losses) {
        scan.largest = arguments.largest[row];
        scan.sum = arguments.sum[row];
      }
      go_on(in_memory, scan);
    }
    if (!present && grad_row != nullptr) fill_with_zeros(layout, team, grad_row, aligned);
  }
  sums.finish();
}

}  // namespace monosoftmax::cuda
