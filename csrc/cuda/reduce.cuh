// Sums and maxima over the threads of a block or of a cluster of blocks, in a fixed order: the same in every run.
#pragma once

#include "arithmetic.cuh"

namespace monosoftmax::cuda {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;
constexpr int kMostBlocks = 8;  // of a cluster
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Sum {
  static constexpr float kNothing = 0;
  static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
// The larger number; if one is NaN, the other.
struct Maximum {
  static constexpr float kNothing = -3.4028234663852886e38f;
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces over all lanes of a warp. All lanes get the result.
template <class Operation>
__device__ __forceinline__ float reduce_warp(float x) {
  MONOSOFTMAX_UNROLL for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = Operation::of(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

// Shared memory for reduce() of kCount numbers. A reduction ends without a barrier. So its memory may be used again
// only after one more barrier of all threads.
template <int kCount>
struct ReductionMemory {
  float of_warps[kCount][kMostWarps];
  float of_blocks[kCount][kMostBlocks];
};

// Reduces over all threads of the cluster. All threads get the result.
template <class Operation, int kCount>
__device__ __forceinline__ void reduce(float (&x)[kCount], ReductionMemory<kCount>& memory) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) {
    x[i] = reduce_warp<Operation>(x[i]);
    if (lane == 0) memory.of_warps[i][warp] = x[i];
  }
  __syncthreads();
  MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) {
    x[i] = reduce_warp<Operation>(lane < warps ? memory.of_warps[i][lane] : Operation::kNothing);
  }
  const unsigned blocks = Cluster::blocks();
  if (blocks == 1) return;
  if (threadIdx.x < blocks) {
    // Each of the first threads writes to one block.
    auto& of_peer = *Cluster::of_block(&memory, threadIdx.x);
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) of_peer.of_blocks[i][Cluster::rank()] = x[i];
  }
  Cluster::sync();
  MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) {
    x[i] = Operation::kNothing;
    MONOSOFTMAX_NO_UNROLL for (unsigned block = 0; block < blocks; ++block) {
      x[i] = Operation::of(x[i], memory.of_blocks[i][block]);
    }
  }
}

}  // namespace monosoftmax::cuda
