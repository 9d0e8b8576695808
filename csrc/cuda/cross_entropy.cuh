// The loss of rows of logits, and its gradient with respect to logits and coefficients.
//
//   cross_entropy_kernel           losses: each row is read once
//   cross_entropy_gradient_kernel  losses and gradients: where kResident, the row is read once, kept in the shared
//   memory
//                                  of a block, or of the blocks of a cluster, and its gradient written once. Otherwise
//                                  it is read once for the loss and once more, from the L2 cache if it has stayed
//                                  there, for the gradient; without the losses, from the row_stats of an earlier call,
//                                  only that.
//
// A row is described by its largest y and sum exp(y - largest), as on the CPU (csrc/row). The largest y is y of the
// largest logit, as f increases: finding it takes no f. e^(y - largest) is 2^(y log2(e) - shift), shift being
// round(largest log2(e)): one fma and one ex2. The rounding of shift is a factor that all exponentials of a row share;
// it cancels where they are divided by their sum, in p and in log(sum) - (y_t - largest), for which the latter is
// formed with the same shift.
//
// Hazards: a thread reads of a row what it copied, or what it writes: grad_input may be input, and no barrier protects
// the row. Blocks of a cluster tell each other maxima and sums only (reduce.cuh). Rows that are ignored may hold
// anything: they are not read. A target that is no class makes its row's loss and gradient NaN.
#pragma once

#include "../row/loss.h"
#include "coefficient_sums.cuh"
#include "memory.cuh"
#include "transform.cuh"

namespace monosoftmax::cuda {

// 2^(y log2(e) - shift).
template <class T>
__device__ __forceinline__ T exponential(T y, float shift) {
  return each<float>(y, [shift](float x) { return exp2_approximate(__fmaf_rn(x, kLog2E, -shift)); });
}

// Calls visitor(z, i) with the logits i to i + kWidth of those of a chunk.
template <class T, int kElements, class Visitor>
__device__ __forceinline__ void for_each_group(const float (&logits)[kElements], Visitor&& visitor) {
  MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; i += T::kWidth) {
    T z;
    MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) z.of[j] = logits[i + j];
    visitor(z, i);
  }
}

// The target of a row, and what follows from it and the options.
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
  // -1, where there is none.
  __device__ int column() const { return valid_ ? static_cast<int>(column_) : -1; }
  __device__ const RowLoss<float, float>& loss() const { return loss_; }

 private:
  int64_t column_;
  bool ignored_, valid_;
  RowLoss<float, float> loss_;
};

// What is known of a row. gap: y_t - largest, and gaps: sum_j w_j (y_j - largest), read where labels are smoothed; both
// in units of ln 2.
struct RowScan {
  float largest, sum, gap, gaps;
};

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

// Of an ignored row whose lse nobody wants.
__device__ inline void write_nothing(const CrossEntropyArguments& arguments, int64_t row) {
  arguments.loss[row] = arguments.lse[row] = arguments.largest[row] = arguments.sum[row] = 0;
}

// The threads that share a row: of a block, or of the blocks of a cluster.
struct Team {
  int thread, threads;

  __device__ Team() : thread(Cluster::rank() * blockDim.x + threadIdx.x), threads(Cluster::blocks() * blockDim.x) {}
};

// The rows of logits as the loops below find them, in memory: chunk c, the i-th of this thread, and edges.
template <class E>
struct RowInMemory {
  const E* row;
  const RowLayout<E>& layout;

  __device__ __forceinline__ Chunk<E> chunk(int c, int) const { return load_chunk(row + layout.column_of_chunk(c)); }
  __device__ __forceinline__ float edge(int e) const { return load_element(row + layout.column_of_edge(e)); }
};

// And in shared memory, [chunks of a thread][threads]. Each thread copies, and reads, its own.
template <class E>
class ResidentRow {
 public:
  __device__ ResidentRow(const RowInMemory<E>& from, const Team& team, unsigned char* shared)
      : kept_(reinterpret_cast<Chunk<E>*>(shared) + threadIdx.x), edge_(0) {
    MONOSOFTMAX_UNROLL_4 for (int c = team.thread, i = 0; c < from.layout.chunks(); c += team.threads, ++i) {
      copy_chunk(kept_ + i * blockDim.x, from.row + from.layout.column_of_chunk(c));
    }
    if (team.thread < from.layout.edges()) edge_ = from.edge(team.thread);
    wait_for_copies();
  }
  __device__ __forceinline__ Chunk<E> chunk(int, int i) const { return kept_[i * blockDim.x]; }
  // There are no more edges than threads.
  __device__ __forceinline__ float edge(int) const { return edge_; }

 private:
  Chunk<E>* kept_;
  float edge_;
};

// Shared memory for the reductions of a row.
struct ScanMemory {
  ReductionMemory<1> maximum;
  ReductionMemory<3> sums;
};

// sum_j w_j (y_j - y_t) over a group of y.
template <class T>
__device__ __forceinline__ float gaps_of(const T& y, float reference, const float* weight, int column) {
  float gaps = 0;
  MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
    const float gap = y.of[j] - reference;
    gaps = weight == nullptr ? gaps + gap : __fmaf_rn(__ldg(weight + column + j), gap, gaps);
  }
  return gaps;
}

// In one pass over the row: each thread has its own largest y and sum until the row ends.
template <class T, bool kSmooths, class F, class E>
__device__ RowScan scan_once_as(const F& f, const CrossEntropyArguments& arguments, const RowInMemory<E>& row,
                                const Team& team, const RowTarget& target, ScanMemory& memory) {
  const RowLayout<E>& layout = row.layout;
  float target_y = 0;
  if (target.column() >= 0) target_y = f.value(T(load_element(row.row + target.column()))).of[0];
  // The sum of V numbers of the size of y would lose the loss.
  const float reference = fabsf(target_y) < INFINITY ? target_y : 0;
  // Scaled by log2(e), and rounded.
  float largest = lowest_logit<float>(), shift = largest * kLog2E, sum = 0, gaps = 0;
  for (int c = team.thread; c < layout.chunks(); c += team.threads) {
    constexpr int kElements = Chunk<E>::kElements;
    float logits[kElements], y[kElements];
    row.chunk(c, 0).unpack(logits);
    float chunk_largest = largest;
    for_each_group<T>(logits, [&](T z, int i) {
      const T value = f.value(z);
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
        y[i + j] = value.of[j];
        chunk_largest = fmaxf(chunk_largest, value.of[j]);
      }
    });
    const float new_shift = chunk_largest * kLog2E;
    sum *= exp2_approximate(shift - new_shift);
    largest = chunk_largest;
    shift = new_shift;
    MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) sum += exponential(Float(y[i]), shift).of[0];
    if constexpr (kSmooths) {
      MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) {
        gaps += gaps_of(Float(y[i]), reference, arguments.weight, layout.column_of_chunk(c) + i);
      }
    }
  }
  for (int e = team.thread; e < layout.edges(); e += team.threads) {
    const Float y(f.value(T(row.edge(e))).of[0]);
    const float new_largest = fmaxf(largest, y.of[0]), new_shift = new_largest * kLog2E;
    sum = sum * exp2_approximate(shift - new_shift) + exponential(y, new_shift).of[0];
    largest = new_largest;
    shift = new_shift;
    if constexpr (kSmooths) gaps += gaps_of(y, reference, arguments.weight, layout.column_of_edge(e));
  }
  float maximum[1] = {largest};
  reduce<Maximum>(maximum, memory.maximum);
  const float row_shift = maximum[0] * kLog2E;
  float sums[3] = {sum * exp2_approximate(shift - row_shift), gaps, 0};
  reduce<Sum>(sums, memory.sums);
  const float reference_gap = __fmaf_rn(reference, kLog2E, -row_shift);
  const float weights = arguments.weight_sum == nullptr ? arguments.classes : *arguments.weight_sum;
  return {maximum[0], sums[0], __fmaf_rn(target_y, kLog2E, -row_shift),
          kSmooths ? __fmaf_rn(weights, reference_gap, sums[1] * kLog2E) : 0};
}

// In two copies: what smoothed labels need would cost the others a third of their instructions.
template <class T, class F, class E>
__device__ RowScan scan_once(const F& f, const CrossEntropyArguments& arguments, const RowInMemory<E>& row,
                             const Team& team, const RowTarget& target, ScanMemory& memory) {
  return arguments.label_smoothing > 0 ? scan_once_as<T, true>(f, arguments, row, team, target, memory)
                                       : scan_once_as<T, false>(f, arguments, row, team, target, memory);
}

// Of a row on chip: first its largest logit, two in an instruction, then the sum. Without class weights, where labels
// are smoothed.
template <class T, class F, class E>
__device__ RowScan scan_resident(const F& f, const CrossEntropyArguments& arguments, const ResidentRow<E>& row,
                                 const RowLayout<E>& layout, const Team& team, const RowTarget& target,
                                 ScanMemory& memory) {
  constexpr int kElements = Chunk<E>::kElements;
  const bool has_edge = team.thread < layout.edges();
  Chunk<E> most = Chunk<E>::lowest();
  MONOSOFTMAX_UNROLL_4 for (int c = team.thread, i = 0; c < layout.chunks(); c += team.threads, ++i) {
    most = most.larger(row.chunk(c, i));
  }
  float logits[kElements];
  most.unpack(logits);
  float maximum[1] = {logits[0]};
  MONOSOFTMAX_UNROLL for (int i = 1; i < kElements; ++i) maximum[0] = fmaxf(maximum[0], logits[i]);
  if (has_edge) maximum[0] = fmaxf(maximum[0], row.edge(team.thread));
  reduce<Maximum>(maximum, memory.maximum);
  const float largest = f.value(T(maximum[0])).of[0], shift = largest * kLog2E;

  // Of each place in a chunk, so that an addition does not wait for the one before.
  float sums[3] = {0, 0, 0}, parts[kElements];
  MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) parts[i] = 0;
  for (int c = team.thread, i = 0; c < layout.chunks(); c += team.threads, ++i) {
    row.chunk(c, i).unpack(logits);
    for_each_group<T>(logits, [&](T z, int k) {
      const T e = exponential(f.value(z), shift);
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) parts[k + j] += e.of[j];
    });
  }
  MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) sums[0] += parts[i];
  if (has_edge) sums[0] += exponential(f.value(T(row.edge(team.thread))), shift).of[0];

  // The gap of the target comes from the thread that has it; the others add 0.
  const auto gap_of = [&](float z) { return __fmaf_rn(f.value(T(z)).of[0], kLog2E, -shift); };
  if (has_edge && layout.column_of_edge(team.thread) == target.column()) sums[1] = gap_of(row.edge(team.thread));
  if (arguments.label_smoothing > 0) {
    for (int c = team.thread, i = 0; c < layout.chunks(); c += team.threads, ++i) {
      row.chunk(c, i).unpack(logits);
      for_each_group<T>(logits, [&](T z, int) {
        const T y = f.value(z);
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) sums[2] += __fmaf_rn(y.of[j], kLog2E, -shift);
      });
    }
    if (has_edge) sums[2] += gap_of(row.edge(team.thread));
  }
  reduce<Sum>(sums, memory.sums);
  return {largest, sums[0], sums[1], sums[2]};
}

// dL/dy of a row: fma(e, spread, -of_weight), and of the target what target() says.
class GradientOfY {
 public:
  __device__ GradientOfY(const CrossEntropyArguments& arguments, int64_t row, const RowTarget& target, float factor,
                         float largest, float sum)
      : shift(largest * kLog2E), sum_(sum) {
    const float grad_loss = target.ignored() ? 0 : arguments.grad_loss[row * arguments.grad_loss_stride] * factor;
    const float grad_lse = arguments.grad_lse == nullptr ? 0 : arguments.grad_lse[row];
    const auto of = target.loss().gradient(grad_loss, grad_lse, largest, sum);
    // A row of -inf only has no p: NaN, as its loss.
    inverse_ = sum == 0 || !(target.valid() || target.ignored()) ? NAN : 1 / sum;
    of_p_ = of.of_p;
    of_target_ = of.of_target;
    extra_ = of.extra_of_p;
    of_weight = of.of_weight;
    spread = (of_p_ + extra_) * inverse_;
  }
  // With the parts that cancel where p is next to 1 subtracted from each other first; e is that of the target.
  __device__ __forceinline__ float of_target(float e, float weight) const {
    const float near = e * inverse_;
    const float p = __fmaf_rn(__fmaf_rn(-near, sum_, e), inverse_, near);  // e / sum, to rounding
    return __fmaf_rn(p, extra_, __fmaf_rn(p, of_p_, -__fmaf_rn(of_weight, weight, of_target_)));
  }

  float shift, spread, of_weight;

 private:
  float sum_, inverse_, of_p_, of_target_, extra_;
};

// Writes the gradient of a row, where there is one to write, and adds to the sums. Class weights with smoothed labels
// are for rows of edges only.
template <class T, class F, class Sums, class E, class Row>
__device__ void differentiate(const F& f, const CrossEntropyArguments& arguments, const Row& row,
                              const RowLayout<E>& layout, const Team& team, const RowTarget& target,
                              const GradientOfY& gradient, E* grad_row, bool aligned, Sums& sums) {
  constexpr int kElements = Chunk<E>::kElements;
  const int lane = threadIdx.x % kWarp;
  // With WarpSums, all lanes of a warp go on as long as one has something to do.
  for (int c = team.thread, k = 0; (Sums::kWarpWide ? c - lane : c) < layout.chunks(); c += team.threads, ++k) {
    const bool here = !Sums::kWarpWide || c < layout.chunks();
    Chunk<E> chunk = here ? row.chunk(c, k) : Chunk<E>::lowest();
    if constexpr (Sums::kNeeded) chunk = chunk.larger(Chunk<E>::lowest());
    float logits[kElements], grad[kElements];
    chunk.unpack(logits);
    const int column = layout.column_of_chunk(c);
    for_each_group<T>(logits, [&](T z, int i) {
      const auto point = f.at(z);
      const T e = exponential(point.value, gradient.shift);
      T dy = Arithmetic<T>::fma(e, T(gradient.spread), T(-gradient.of_weight));
      if (Sums::kWarpWide && !here) dy = T(0);
      sums.add(f, point, z, dy);
      const T dz = dy * point.derivative;
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) grad[i + j] = dz.of[j];
    });
    if (grad_row != nullptr && here) store_chunk(grad_row + column, grad, aligned);
  }
  for (int edge = team.thread; (Sums::kWarpWide ? edge - lane : edge) < layout.edges(); edge += team.threads) {
    const bool here = !Sums::kWarpWide || edge < layout.edges();
    const int column = here ? layout.column_of_edge(edge) : 0;
    float logit = here ? row.edge(edge) : 0;
    if constexpr (Sums::kNeeded) logit = fmaxf(logit, lowest_logit<E>());
    const T z(logit);
    const auto point = f.at(z);
    const float e = exponential(point.value, gradient.shift).of[0];
    const float weight = gradient.of_weight != 0 && arguments.weight != nullptr ? arguments.weight[column] : 1;
    T dy(0);
    if (here) {
      dy.of[0] = column == target.column() ? gradient.of_target(e, weight)
                                           : __fmaf_rn(e, gradient.spread, -(gradient.of_weight * weight));
    }
    sums.add(f, point, z, dy);
    if (grad_row != nullptr && here) store_element(grad_row + column, dy.of[0] * point.derivative.of[0]);
  }
}

template <class E>
__device__ void fill_with_zeros(const RowLayout<E>& layout, const Team& team, E* grad_row, bool aligned) {
  float zeros[Chunk<E>::kElements];
  MONOSOFTMAX_UNROLL for (int i = 0; i < Chunk<E>::kElements; ++i) zeros[i] = 0;
  for (int c = team.thread; c < layout.chunks(); c += team.threads) {
    store_chunk(grad_row + layout.column_of_chunk(c), zeros, aligned);
  }
  for (int e = team.thread; e < layout.edges(); e += team.threads) {
    store_element(grad_row + layout.column_of_edge(e), 0.0f);
  }
}

template <class Transform, class T, class E>
__global__ void __launch_bounds__(kMostThreads, 1) cross_entropy_kernel(const CrossEntropyArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  const auto f = Transform::load(arguments.transform, shared);
  const Team team;
  for (int64_t row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const RowTarget target(arguments, row);
    if (target.ignored() && !arguments.return_lse) {
      if (team.thread == 0) write_nothing(arguments, row);
      continue;
    }
    const E* logits = static_cast<const E*>(arguments.input) + row * arguments.stride;
    const RowLayout<E> layout(logits, arguments.classes, target.column());
    const RowScan scan = scan_once<T>(f, arguments, RowInMemory<E>{logits, layout}, team, target, memory[0]);
    if (team.thread == 0) write_results(arguments, row, target, scan);
  }
}

template <class Transform, class T, class Sums, class E, bool kResident>
__global__ void __launch_bounds__(kMostThreads, 1)
    cross_entropy_gradient_kernel(const CrossEntropyArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  const float factor = arguments.factor == nullptr ? 1 : *arguments.factor;
  if (arguments.factor != nullptr && factor == 1) return;
  const auto f = Transform::load(arguments.transform, shared);
  Sums sums(arguments.sums, arguments.transform, shared + arguments.sums_offset);
  const Team team;
  // Blocks must have begun before others write to their memory.
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
    const auto go_on = [&](const auto& row_of_logits, float largest, float sum) {
      if (!present) return;
      const GradientOfY gradient(arguments, row, target, factor, largest, sum);
      differentiate<T>(f, arguments, row_of_logits, layout, team, target, gradient, grad_row, aligned, sums);
    };
    if constexpr (kResident) {
      if (scanned) {
        const ResidentRow<E> resident(in_memory, team, shared + arguments.row_offset);
        const RowScan scan = scan_resident<T>(f, arguments, resident, layout, team, target, memory[0]);
        if (team.thread == 0) write_results(arguments, row, target, scan);
        go_on(resident, scan.largest, scan.sum);
      }
    } else {
      RowScan scan{};
      if (scanned) {
        scan = scan_once<T>(f, arguments, in_memory, team, target, memory[0]);
        if (team.thread == 0) write_results(arguments, row, target, scan);
      } else if (!arguments.losses) {
        scan.largest = arguments.largest[row];
        scan.sum = arguments.sum[row];
      }
      go_on(in_memory, scan.largest, scan.sum);
    }
    if (!present && grad_row != nullptr) fill_with_zeros(layout, team, grad_row, aligned);
  }
  sums.finish();
}

}  // namespace monosoftmax::cuda
