// Races: accesses of two threads, one of them a write, in no particular order. Only the thread sanitizer sees them,
// since threads take turns only where they meet.
#pragma once

#include "cases.h"

namespace monosoftmax::test {

__global__ void no_barrier(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  out[threadIdx.x] = s[63 - threadIdx.x];
}

// The barrier between the reads of one round and the writes of the next is missing.
__global__ void no_second_barrier(float* out) {
  SHARED_ARRAY(float, s, [64]);
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = static_cast<float>(i);
    __syncthreads();
    sum += s[63 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void between_blocks(float* out) { out[threadIdx.x] += 1; }

// By any number of blocks between them, and by threads of other indices.
__global__ void between_distant_blocks(float* out) {
  __syncthreads();
  if (blockIdx.x == 0) out[threadIdx.x] = 1;
  if (blockIdx.x == gridDim.x - 1) out[blockDim.x - 1 - threadIdx.x] = 2;
  __syncthreads();
}

__global__ void no_syncwarp(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void syncwarp_of_others(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  const float one = __shfl_xor_sync(0xffffffff, 1.0f, 16);  // by then all have written
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000);
  out[threadIdx.x] = one + s[threadIdx.x ^ 16];
}

__global__ void shuffle_as_fence(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  const float one = __shfl_xor_sync(0xffffffff, 1.0f, 1);
  out[threadIdx.x] = one + s[threadIdx.x ^ 1];
}

__global__ void ballot_as_fence(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  const unsigned votes = __ballot_sync(0xffffffff, 1);
  out[threadIdx.x] = static_cast<float>(votes) + s[threadIdx.x ^ 1];
}

// That all other warps are past their writes follows from nothing.
__global__ void syncwarp_as_barrier(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x ^ 32];
}

__global__ void lost_update_in_shared(float* out) {
  SHARED_ARRAY(unsigned, bins, [4]);
  if (threadIdx.x < 4) bins[threadIdx.x] = 0;
  __syncthreads();
  bins[threadIdx.x % 4] += 1;
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(bins[threadIdx.x % 4]);
}

__global__ void lost_update_in_global(float* out) {
  if (threadIdx.x == 0) *out = *out + 1;
}

__global__ void atomic_and_plain(float* out) {
  if (threadIdx.x == 0) {
    *out = 1;
  } else {
    atomicAdd(out, 1);
  }
}

__global__ void atomic_as_fence(float* out) {
  SHARED_ARRAY(unsigned, arrived, [1]);
  SHARED_ARRAY(float, s, [64]);
  if (threadIdx.x == 0) arrived[0] = 0;
  __syncthreads();
  s[threadIdx.x] = 1;
  __threadfence_block();
  if (atomicAdd(&arrived[0], 1) == 63) out[0] = s[0] + s[63];
}

__global__ void copy_of_another_thread(float* out) {
  SHARED_ARRAY(float, s, [64]);
  __pipeline_memcpy_async(&s[threadIdx.x], &out[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);  // for the copies of this thread
  const float other = s[threadIdx.x ^ 1];
  __syncthreads();
  out[threadIdx.x] = other;
}

__global__ void copy_over_what_is_read(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  __syncthreads();
  __pipeline_memcpy_async(&s[threadIdx.x], &out[threadIdx.x], 4);
  __pipeline_commit();
  const float other = s[threadIdx.x ^ 1];
  __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = other;
}

// The barrier is of each block of the cluster by itself.
__global__ void barrier_of_block_in_cluster(float* out) {
  SHARED_ARRAY(float, s, [64]);
  cuda::Cluster::sync();
  s[threadIdx.x] = 1;
  __syncthreads();
  const float other = *cuda::Cluster::of_block(&s[threadIdx.x], cuda::Cluster::rank() ^ 1);
  cuda::Cluster::sync();
  out[blockIdx.x * 64 + threadIdx.x] = other == 1 ? other : 0;
}

// Whose barriers in one block have nothing to do with those of the other.
__global__ void between_blocks_of_cluster(float* out) {
  cuda::Cluster::sync();
  __syncthreads();
  out[threadIdx.x] += 1;
  __syncthreads();
  cuda::Cluster::sync();
}

inline const std::vector<Case> kDefectsOfOrder = {
    race("no_barrier", run<no_barrier>),
    race("no_second_barrier", run<no_second_barrier>),
    race("between_blocks", run<between_blocks, 2>),
    race("between_distant_blocks", run<between_distant_blocks, 6, 64>),
    race("no_syncwarp", run<no_syncwarp>),
    race("syncwarp_of_others", run<syncwarp_of_others>),
    race("shuffle_as_fence", run<shuffle_as_fence>),
    race("ballot_as_fence", run<ballot_as_fence>),
    race("syncwarp_as_barrier", run<syncwarp_as_barrier>),
    race("lost_update_in_shared", run<lost_update_in_shared>),
    race("lost_update_in_global", run<lost_update_in_global, 3>),
    race("atomic_and_plain", run<atomic_and_plain>),
    race("atomic_as_fence", run<atomic_as_fence>),
    race("copy_of_another_thread", run<copy_of_another_thread>),
    race("copy_over_what_is_read", run<copy_over_what_is_read>),
    race("barrier_of_block_in_cluster", run<barrier_of_block_in_cluster, 2, 64, 0, 2>),
    race("between_blocks_of_cluster", run<between_blocks_of_cluster, 2, 64, 0, 2>),
};

}  // namespace monosoftmax::test
