// Statistics of each token under softmax(y), y = f(inner(z)) / temperature: log p of the target, entropy, argmax, lse,
// and the number of logits that are larger than the target's.
//
//   entropy = log(sum_j e_j) + gap,   gap = sum_j e_j (largest - y_j) / sum_j e_j,   e_j = exp(y_j - largest)
//
// row_stats are the largest y, the sum of e_j and gap: what the gradient of the entropy needs (dense_targets.cuh). y
// increases with the logits, so the logits themselves give argmax and rank.
//
// Memory traffic for each logit: a read from memory, and one more from the L2 cache if the row is still there.
// Numerics: scan.cuh, composition.cuh; a term of p = 0 is 0, also at a logit of -inf. Hazards: scan.cuh.
#pragma once

#include "scan.cuh"
#include "transform.cuh"

namespace monosoftmax::cuda {

// The largest logit that a thread has seen, its first column, and the number of logits that are larger than the
// target's. NaN is larger than any number.
struct Seen {
  static constexpr int kNowhere = 0x7FFFFFFF;

  float largest;
  int column, larger;

  static __device__ __forceinline__ Seen nothing() { return {-INFINITY, kNowhere, 0}; }
  __device__ __forceinline__ void see(float logit, int at) {
    const bool is_nan = logit != logit, was_nan = largest != largest;
    const bool equal = logit == largest || (is_nan && was_nan);
    if (logit > largest || (is_nan && !was_nan) || (equal && at < column)) {
      largest = logit;
      column = at;
    }
  }
  __device__ __forceinline__ void take(float their_largest, int their_column, int their_larger) {
    see(their_largest, their_column);
    larger += their_larger;
  }
};

// Combines all lanes of a warp. All lanes get the result.
__device__ __forceinline__ Seen seen_by_warp(Seen seen) {
  MONOSOFTMAX_UNROLL for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float largest = __shfl_xor_sync(kAllLanes, seen.largest, distance);
    const int column = __shfl_xor_sync(kAllLanes, seen.column, distance);
    seen.take(largest, column, __shfl_xor_sync(kAllLanes, seen.larger, distance));
  }
  return seen;
}

// Combines all threads of the block.
__device__ inline Seen seen_by_block(Seen seen, Seen* of_warps) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  seen = seen_by_warp(seen);
  if (lane == 0) of_warps[threadIdx.x / kWarp] = seen;
  __syncthreads();
  return seen_by_warp(lane < warps ? of_warps[lane] : Seen::nothing());
}

template <class Transform, class T, class E>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    token_statistics_kernel(const TokenStatisticsArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  SHARED_ARRAY(ReductionMemory<1>, of_gaps, [1]);
  SHARED_ARRAY(Seen, of_warps, [kMostWarps]);
  constexpr int kElements = Chunk<E>::kElements;
  const auto f = load_composed<Transform>(arguments.transform, shared);
  const Team team;
  for (int64_t row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const int64_t target = arguments.target[row];
    const bool ignored = target == arguments.ignore_index;
    const bool valid = !ignored && target >= 0 && target < arguments.classes;
    const E* logits = static_cast<const E*>(arguments.input) + row * arguments.stride;
    const RowLayout<E> layout(logits, arguments.classes, -1);
    const RowInMemory<E> in_memory{logits, layout};
    const RowScan scan =
        scan_once<T, false>(f, {nullptr, 0}, in_memory, team, valid ? static_cast<int>(target) : -1, memory[0]);
    const float shift = f.shift_of(scan.largest);
    const float target_logit = valid ? load_element(logits + target) : 0;
    // sum_j e_j (largest - y_j), in units of ln 2.
    float gaps[1] = {0};
    Seen seen = Seen::nothing();
    const auto take = [&](float logit, float value, int column) {
      const float gap = f.gap(value, shift);
      gaps[0] = __fmaf_rn(exp2_approximate(gap), -fmaxf(gap, kFarGap), gaps[0]);
      seen.larger += logit > target_logit;
      seen.see(logit, column);
    };
    for (int c = team.thread; c < layout.chunks(); c += team.threads) {
      const Chunk<E> chunk = in_memory.chunk(c, 0);
      float logits[kElements], arguments_of_f[kElements];
      chunk.unpack(logits);
      f.unpack(chunk, arguments_of_f);
      for_each_group<T>(arguments_of_f, [&](T z, int i) {
        const T value = f.function.value(z);
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
          take(logits[i + j], value.of[j], layout.column_of_chunk(c) + i + j);
        }
      });
    }
    for (int e = team.thread; e < layout.edges(); e += team.threads) {
      const float logit = in_memory.edge(e);
      take(logit, f.template of_logit<T>(logit), layout.column_of_edge(e));
    }
    reduce<Sum>(gaps, of_gaps[0]);
    seen = seen_by_block(seen, of_warps);
    if (team.thread == 0) {
      const float log2_sum = scan.sum == 0 ? NAN : log2f(scan.sum), gap = gaps[0] / scan.sum * kLn2;
      arguments.log_prob[row] = ignored ? 0 : valid ? (scan.gap - log2_sum) * kLn2 : NAN;
      arguments.entropy[row] = log2_sum * kLn2 + gap;
      arguments.lse[row] = scan.sum == 0 ? -INFINITY : scan.largest + log2_sum * kLn2;
      arguments.argmax[row] = seen.column == Seen::kNowhere ? 0 : seen.column;
      arguments.rank[row] = valid ? seen.larger : -1;
      arguments.row_stats[row] = scan.largest;
      arguments.row_stats[arguments.rows + row] = scan.sum;
      arguments.row_stats[2 * arguments.rows + row] = gap;
    }
  }
}

}  // namespace monosoftmax::cuda
