// Finds the largest y of a row and sum exp(y - largest y), which describe a row as on the CPU (csrc/row), where
// y = f(inner(z)) / temperature (composition.cuh).
//
// The largest y is y of the largest logit, since f increases. So it takes no f to find it if the row is on chip.
// e^(y - largest y) is 2^(f unit - shift), with unit = log2(e) / temperature and shift = round(log2(e) largest y): one
// fma and one ex2. The rounding of shift is a common factor of all exponentials of a row. It cancels in p, which is
// divided by their sum, and in log(sum) - (y_t - largest y), as y_t - largest y is computed with the same shift.
//
// Hazards: a thread reads only those elements of a row on chip that it copied itself, so no barrier protects them.
// Blocks of a cluster exchange only maxima and sums (reduce.cuh).
#pragma once

#include "composition.cuh"
#include "reduce.cuh"

namespace monosoftmax::cuda {

// Calls visitor(z, i) with the numbers from i to i + kWidth of a chunk.
template <class T, int kElements, class Visitor>
__device__ __forceinline__ void for_each_group(const float (&logits)[kElements], Visitor&& visitor) {
  MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; i += T::kWidth) {
    T z;
    MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) z.of[j] = logits[i + j];
    visitor(z, i);
  }
}

// The result of a scan. largest is that of y. gap is y_t less the largest y. gaps is the sum of such gaps with weights,
// read only if labels are smoothed. Both are in units of ln 2.
struct RowScan {
  float largest, sum, gap, gaps;
};

// A gap in units of ln 2 beyond which 2^gap is 0. Where a gap multiplies it, this number takes the place of -inf, with
// which the product would be NaN.
constexpr float kFarGap = -200;

// The threads that share a row: the threads of a block, or of the blocks of a cluster.
struct Team {
  int thread, threads;

  __device__ Team() : thread(Cluster::rank() * blockDim.x + threadIdx.x), threads(Cluster::blocks() * blockDim.x) {}
};

// A row of logits in memory, for the loops below. Chunk c is the i-th chunk of this thread.
template <class E>
struct RowInMemory {
  const E* row;
  const RowLayout<E>& layout;

  __device__ __forceinline__ Chunk<E> chunk(int c, int) const { return load_chunk(row + layout.column_of_chunk(c)); }
  // The same, read again rather than kept in registers.
  __device__ __forceinline__ Chunk<E> chunk_again(int c, int i) const { return chunk(opaque(c), i); }
  __device__ __forceinline__ float edge(int e) const { return load_element(row + layout.column_of_edge(e)); }
};

// A row in shared memory, [chunks of a thread][threads], for the same loops. Each thread copies and reads its own
// chunks.
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
  __device__ __forceinline__ Chunk<E> chunk_again(int c, int i) const { return chunk(c, opaque(i)); }
  // There are no more edges than threads.
  __device__ __forceinline__ float edge(int) const { return edge_; }

 private:
  Chunk<E>* kept_;
  float edge_;
};

// Writes zeros to all elements of a row.
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

// Shared memory for the reductions of a row.
struct ScanMemory {
  ReductionMemory<1> maximum;
  ReductionMemory<3> sums;
};

// The weights of the classes for smoothed labels; weight is null for weights of 1.
struct ClassWeights {
  const float* weight;
  float sum;
};

// Adds w_j times a gap of f_j.
__device__ __forceinline__ void add_gap(float& gaps, float gap, const float* weight, int column) {
  gaps = weight == nullptr ? gaps + gap : __fmaf_rn(__ldg(weight + column), gap, gaps);
}

// Scans the row in one pass. Each thread has its own largest f and sum until the row ends. target: its column, or -1.
template <class T, bool kSmooths, class F, class E>
__device__ RowScan scan_once(const Composed<F>& f, const ClassWeights& weights, const RowInMemory<E>& row,
                             const Team& team, int target, ScanMemory& memory) {
  const RowLayout<E>& layout = row.layout;
  float of_target = 0;
  if (target >= 0) of_target = f.template of_logit<T>(load_element(row.row + target));
  // Subtracted from every f: in a sum of V numbers of the size of f, rounding would hide the loss.
  const float reference = fabsf(of_target) < INFINITY ? of_target : 0;
  const float inverse = f.inverse_temperature();
  float largest = lowest_logit<float>(), shift = f.shift_of(largest * inverse), sum = 0, gaps = 0;
  for (int c = team.thread; c < layout.chunks(); c += team.threads) {
    constexpr int kElements = Chunk<E>::kElements;
    float arguments[kElements], values[kElements];
    f.unpack(row.chunk(c, 0), arguments);
    float chunk_largest = largest;
    for_each_group<T>(arguments, [&](T z, int i) {
      const T value = f.function.value(z);
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
        values[i + j] = value.of[j];
        chunk_largest = fmaxf(chunk_largest, value.of[j]);
      }
    });
    const float new_shift = f.shift_of(chunk_largest * inverse);
    sum *= exp2_approximate(shift - new_shift);
    largest = chunk_largest;
    shift = new_shift;
    MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) sum += f.exponential(Float(values[i]), shift).of[0];
    if constexpr (kSmooths) {
      MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) {
        add_gap(gaps, values[i] - reference, weights.weight, layout.column_of_chunk(c) + i);
      }
    }
  }
  for (int e = team.thread; e < layout.edges(); e += team.threads) {
    const Float value(f.template of_logit<T>(row.edge(e)));
    const float new_largest = fmaxf(largest, value.of[0]), new_shift = f.shift_of(new_largest * inverse);
    sum = sum * exp2_approximate(shift - new_shift) + f.exponential(value, new_shift).of[0];
    largest = new_largest;
    shift = new_shift;
    if constexpr (kSmooths) add_gap(gaps, value.of[0] - reference, weights.weight, layout.column_of_edge(e));
  }
  float maximum[1] = {largest};
  reduce<Maximum>(maximum, memory.maximum);
  const float largest_y = maximum[0] * inverse, row_shift = f.shift_of(largest_y);
  float sums[3] = {sum * exp2_approximate(shift - row_shift), gaps, 0};
  reduce<Sum>(sums, memory.sums);
  return {largest_y, sums[0], f.gap(of_target, row_shift),
          kSmooths ? __fmaf_rn(weights.sum, f.gap(reference, row_shift), sums[1] * f.unit) : 0};
}

// Scans a row on chip: first its largest logit, two logits in an instruction, then the sum. Smoothed labels have no
// class weights here.
template <class T, class F, class E>
__device__ RowScan scan_resident(const Composed<F>& f, const ResidentRow<E>& row, const RowLayout<E>& layout,
                                 const Team& team, int target, bool smooths, ScanMemory& memory) {
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
  const float largest = f.template of_logit<T>(maximum[0]) * f.inverse_temperature(), shift = f.shift_of(largest);

  // One sum for each place in a chunk, so that no addition waits for the addition before.
  float sums[3] = {0, 0, 0}, parts[kElements];
  MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) parts[i] = 0;
  for (int c = team.thread, i = 0; c < layout.chunks(); c += team.threads, ++i) {
    f.unpack(row.chunk(c, i), logits);
    for_each_group<T>(logits, [&](T z, int k) {
      const T e = f.exponential(f.function.value(z), shift);
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) parts[k + j] += e.of[j];
    });
  }
  MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) sums[0] += parts[i];
  const auto gap_of = [&](float logit) { return f.gap(f.template of_logit<T>(logit), shift); };
  if (has_edge) sums[0] += exp2_approximate(gap_of(row.edge(team.thread)));

  // The gap of the target comes from the thread that has it; the others add 0.
  if (has_edge && layout.column_of_edge(team.thread) == target) sums[1] = gap_of(row.edge(team.thread));
  if (smooths) {
    for (int c = team.thread, i = 0; c < layout.chunks(); c += team.threads, ++i) {
      f.unpack(row.chunk(c, i), logits);
      for_each_group<T>(logits, [&](T z, int) {
        const T value = f.function.value(z);
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) sums[2] += f.gap(value.of[j], shift);
      });
    }
    if (has_edge) sums[2] += gap_of(row.edge(team.thread));
  }
  reduce<Sum>(sums, memory.sums);
  return {largest, sums[0], sums[1], sums[2]};
}

}  // namespace monosoftmax::cuda
