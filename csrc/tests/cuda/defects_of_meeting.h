// Threads that do not all come to where they should meet, and blocks of a cluster that leave too early.
#pragma once

#include "cases.h"

namespace monosoftmax::test {

__global__ void barriers_in_both_branches(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void exit_before_barrier(float* out) {
  if (threadIdx.x == 63) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void other_reduction(float* out) {
  const bool first = threadIdx.x < 32;
  out[threadIdx.x] = static_cast<float>(first ? __syncthreads_or(1) : __syncthreads_and(1));
}

__global__ void exit_before_shuffle(float* out) {
  if (threadIdx.x == 40) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 1);
}

__global__ void shuffle_in_branch(float* out) {
  float value = 1;
  if (threadIdx.x % 2 == 1) value += __shfl_xor_sync(0xffffffff, value, 2);
  __syncwarp();
  out[threadIdx.x] = value;
}

__global__ void shuffles_in_both_branches(float* out) {
  if (threadIdx.x % 2 == 1) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 2);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 2.0f, 2);
  }
}

__global__ void shuffle_and_barrier(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 2);
  __syncthreads();
}

__global__ void lane_not_in_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, 1.0f, 1); }

__global__ void source_not_in_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffff, 1.0f, 8);
}

__global__ void mask_beyond_block(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 1); }

// The second half of the warp has all it waits for.
__global__ void masks_differ(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffffff : 0xffff0000;
  out[threadIdx.x] = static_cast<float>(__ballot_sync(mask, 1));
}

// All are in the mask of lane 0, which none of the others waits for in the same way.
__global__ void masks_overlap(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffffff : 0xffff0001;
  out[threadIdx.x] = static_cast<float>(__ballot_sync(mask, 1));
}

__global__ void match_with_wrong_mask(float* out) {
  const unsigned mask = (1u << threadIdx.x % 32) - 1;  // of the lanes before this one
  out[threadIdx.x] = static_cast<float>(__match_any_sync(mask | 1, threadIdx.x % 4));
}

__global__ void others_may_not_have_begun(float* out) {
  SHARED_ARRAY(float, s, [64]);
  cuda::Cluster::of_block(&s[0], cuda::Cluster::rank() ^ 1)[threadIdx.x] = 1;
  cuda::Cluster::sync();
  out[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];
}

__global__ void no_cluster_sync_before_read(float* out) {
  SHARED_ARRAY(float, s, [64]);
  cuda::Cluster::sync();
  const float* other = cuda::Cluster::of_block(&s[threadIdx.x], cuda::Cluster::rank() ^ 1);
  s[threadIdx.x] = 1;
  const float value = *other;
  cuda::Cluster::sync();
  out[blockIdx.x * 64 + threadIdx.x] = value;
}

__global__ void no_cluster_sync_at_end(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  cuda::Cluster::sync();
  out[blockIdx.x * 64 + threadIdx.x] = *cuda::Cluster::of_block(&s[threadIdx.x], cuda::Cluster::rank() ^ 1);
}

// The last thread of all reads from a block that has gone.
__global__ void no_cluster_sync_after_early_mapping(float* out) {
  SHARED_ARRAY(float, s, [64]);
  cuda::Cluster::sync();
  const float* other = cuda::Cluster::of_block(&s[threadIdx.x], cuda::Cluster::rank() ^ 1);
  s[threadIdx.x] = 1;
  cuda::Cluster::sync();
  out[blockIdx.x * 64 + threadIdx.x] = *other;
}

__global__ void write_beyond_other_block(float* out) {
  SHARED_ARRAY(float, s, [64]);
  cuda::Cluster::sync();
  float* others = cuda::Cluster::of_block(&s[0], cuda::Cluster::rank() ^ 1);
  others[threadIdx.x + 1] = 1;
  cuda::Cluster::sync();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

__global__ void cluster_sync_in_one_block(float* out) {
  if (cuda::Cluster::rank() == 0) cuda::Cluster::sync();
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

__global__ void cluster_sync_and_barrier(float* out) {
  if (threadIdx.x < 32) {
    cuda::Cluster::sync();
  } else {
    __syncthreads();
  }
  out[blockIdx.x * 64 + threadIdx.x] = 1;
}

__global__ void cluster_syncs_in_both_branches(float* out) {
  if (cuda::Cluster::rank() == 0) {
    cuda::Cluster::sync();
  } else {
    out[threadIdx.x] = 1;
    cuda::Cluster::sync();
  }
}

__global__ void block_beyond_cluster(float* out) {
  SHARED_ARRAY(float, s, [64]);
  *cuda::Cluster::of_block(&s[threadIdx.x], cuda::Cluster::blocks()) = 1;
  out[threadIdx.x] = 1;
}

__global__ void global_memory_of_block(float* out) {
  *cuda::Cluster::of_block(&out[threadIdx.x], cuda::Cluster::rank() ^ 1) = 1;
}

inline const std::vector<Case> kDefectsOfMeeting = {
    everywhere("barriers_in_both_branches", run<barriers_in_both_branches>, "barrier divergence"),
    everywhere("exit_before_barrier", run<exit_before_barrier>,
               "__syncthreads() reached by some threads after others have exited"),
    everywhere("other_reduction", run<other_reduction>, "barrier divergence"),
    everywhere("exit_before_shuffle", run<exit_before_shuffle>, "lane 8 in mask 0xffffffff has exited"),
    everywhere("shuffle_in_branch", run<shuffle_in_branch>, "are at different places"),
    everywhere("shuffles_in_both_branches", run<shuffles_in_both_branches>, "are at different places"),
    everywhere("shuffle_and_barrier", run<shuffle_and_barrier>, "is at a barrier of the block"),
    everywhere("lane_not_in_mask", run<lane_not_in_mask>, "is not in its own mask 0x0000ffff"),
    everywhere("source_not_in_mask", run<source_not_in_mask>, "which is not in mask 0x0000ffff"),
    everywhere("mask_beyond_block", run<mask_beyond_block, 1, 40>, "names lanes beyond the end of the block"),
    everywhere("masks_differ", run<masks_differ>, "in mask 0xffffffff has exited"),
    everywhere("masks_overlap", run<masks_overlap>, "which is in it, has 0x"),
    everywhere("match_with_wrong_mask", run<match_with_wrong_mask>, "is not in its own mask"),
    everywhere("others_may_not_have_begun", run<others_may_not_have_begun, 2, 64, 0, 2>, "may not have begun"),
    {"no_cluster_sync_before_read", run<no_cluster_sync_before_read, 2, 64, 0, 2>, kNaN, kNaN, kRace},
    everywhere("no_cluster_sync_at_end", run<no_cluster_sync_at_end, 2, 64, 0, 2>, "of the cluster has exited"),
    {"no_cluster_sync_after_early_mapping", run<no_cluster_sync_after_early_mapping, 2, 64, 0, 2>, kNaN, kPoison, kNaN},
    {"write_beyond_other_block", run<write_beyond_other_block, 2, 64, 0, 2>, "0 bytes behind the end of s", kPoison,
     "0 bytes behind the end of s"},
    everywhere("cluster_sync_in_one_block", run<cluster_sync_in_one_block, 2, 64, 0, 2>,
               "Cluster::sync() reached by some threads after others have exited"),
    everywhere("cluster_sync_and_barrier", run<cluster_sync_and_barrier, 2, 64, 0, 2>, "barrier divergence"),
    everywhere("cluster_syncs_in_both_branches", run<cluster_syncs_in_both_branches, 2, 64, 0, 2>,
               "barrier divergence"),
    everywhere("block_beyond_cluster", run<block_beyond_cluster, 2, 64, 0, 2>, "block 2 of a cluster of 2"),
    everywhere("global_memory_of_block", run<global_memory_of_block, 2, 64, 0, 2>,
               "not in the shared memory of this block"),
};

}  // namespace monosoftmax::test
