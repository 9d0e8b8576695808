// Finds the largest y of a row and sum exp(y - largest), which describe a row as on the CPU (csrc/row).
//
// The largest y is y of the largest logit, since f increases. So it takes no f to find it if the row is on chip.
// e^(y - largest) is 2^(y log2(e) - shift), with shift = round(largest log2(e)): one fma and one ex2. The rounding of
// shift is a common factor of all exponentials of a row. It cancels in p, which is divided by their sum, and in
// log(sum) - (y_t - largest), as y_t - largest is computed with the same shift.
//
// Hazards: a thread reads only those elements of a row on chip that it copied itself, so no barrier protects them.
// Blocks of a cluster exchange only maxima and sums (reduce.cuh).
#pragma once

#include "memory.cuh"
#include "reduce.cuh"

namespace monosoftmax::cuda {

// 2^(y log2(e) - shift).
template <class T>
__device__ __forceinline__ T exponential(T y, float shift) {
  return each<float>(y, [shift](float x) { return exp2_approximate(__fmaf_rn(x, kLog2E, -shift)); });
}

// Calls visitor(z, i) with the logits from i to i + kWidth of a chunk.
template <class T, int kElements, class Visitor>
__device__ __forceinline__ void for_each_group(const float (&logits)[kElements], Visitor&& visitor) {
  MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; i += T::kWidth) {
    T z;
    MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) z.of[j] = logits[i + j];
    visitor(z, i);
  }
}

// The result of a scan. gap is y_t - largest. gaps is sum_j w_j (y_j - largest), read only if labels are smoothed. Both
// are in units of ln 2.
struct RowScan {
  float largest, sum, gap, gaps;
};

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

// The weights of the classes for smoothed labels; weight is null for weights of 1.
struct ClassWeights {
  const float* weight;
  float sum;
};

// sum_j w_j (y_j - reference) over a group of y.
template <class T>
__device__ __forceinline__ float gaps_of(const T& y, float reference, const float* weight, int column) {
  float gaps = 0;
  MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
    const float gap = y.of[j] - reference;
    gaps = weight == nullptr ? gaps + gap : __fmaf_rn(__ldg(weight + column + j), gap, gaps);
  }
  return gaps;
}

// Scans the row in one pass. Each thread has its own largest y and sum until the row ends. target: its column, or -1.
template <class T, bool kSmooths, class F, class E>
__device__ RowScan scan_once(const F& f, const ClassWeights& weights, const RowInMemory<E>& row, const Team& team,
                             int target, ScanMemory& memory) {
  const RowLayout<E>& layout = row.layout;
  float target_y = 0;
  if (target >= 0) target_y = f.value(T(load_element(row.row + target))).of[0];
  // Subtracted from every y: in a sum of V numbers of the size of y, rounding would hide the loss.
  const float reference = fabsf(target_y) < INFINITY ? target_y : 0;
  // shift is largest, scaled by log2(e) and rounded.
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
        gaps += gaps_of(Float(y[i]), reference, weights.weight, layout.column_of_chunk(c) + i);
      }
    }
  }
  for (int e = team.thread; e < layout.edges(); e += team.threads) {
    const Float y(f.value(T(row.edge(e))).of[0]);
    const float new_largest = fmaxf(largest, y.of[0]), new_shift = new_largest * kLog2E;
    sum = sum * exp2_approximate(shift - new_shift) + exponential(y, new_shift).of[0];
    largest = new_largest;
    shift = new_shift;
    if constexpr (kSmooths) gaps += gaps_of(y, reference, weights.weight, layout.column_of_edge(e));
  }
  float maximum[1] = {largest};
  reduce<Maximum>(maximum, memory.maximum);
  const float row_shift = maximum[0] * kLog2E;
  float sums[3] = {sum * exp2_approximate(shift - row_shift), gaps, 0};
  reduce<Sum>(sums, memory.sums);
  const float reference_gap = __fmaf_rn(reference, kLog2E, -row_shift);
  return {maximum[0], sums[0], __fmaf_rn(target_y, kLog2E, -row_shift),
          kSmooths ? __fmaf_rn(weights.sum, reference_gap, sums[1] * kLog2E) : 0};
}

// Scans a row on chip: first its largest logit, two logits in an instruction, then the sum. Smoothed labels have no
// class weights here.
template <class T, class F, class E>
__device__ RowScan scan_resident(const F& f, const ResidentRow<E>& row, const RowLayout<E>& layout, const Team& team,
                                 int target, bool smooths, ScanMemory& memory) {
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

  // One sum for each place in a chunk, so that no addition waits for the addition before.
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
  if (has_edge && layout.column_of_edge(team.thread) == target) sums[1] = gap_of(row.edge(team.thread));
  if (smooths) {
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

}  // namespace monosoftmax::cuda
