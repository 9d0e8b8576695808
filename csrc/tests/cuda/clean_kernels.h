// Kernels without a defect, of the kinds that are easily taken for one: no build may report anything.
#pragma once

#include "cases.h"

namespace monosoftmax::test {

// A reduction whose memory is used again.
__global__ void block_reduction(float* out) {
  SHARED_ARRAY(float, of_warp, [32]);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    float part = static_cast<float>(threadIdx.x + round);
    for (int lanes = 16; lanes > 0; lanes /= 2) part += __shfl_xor_sync(0xffffffff, part, lanes);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = part;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += of_warp[warp];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
template <unsigned blocks, unsigned threads>
void run_block_reduction() {
  Numbers out(blocks * threads);
  launch(block_reduction, {.grid = blocks, .block = threads}, out.data());
  expect_each(out, [](size_t) { return 3 * (threads * (threads - 1) / 2 + threads); });
}

// What one launch wrote the next one may read, whichever blocks and threads do.
__global__ void shift_by_one(const float* in, float* out, unsigned count) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = in[(i + 1) % count];
}
inline void run_shift_by_one() {
  Numbers a(130), b(130);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i);
  for (int i = 0; i < 3; ++i) {
    launch(shift_by_one, {.grid = 3, .block = 50}, a.data(), b.data(), 130);
    launch(shift_by_one, {.grid = 5, .block = 32}, b.data(), a.data(), 130);
  }
  expect_each(a, [](size_t i) { return (i + 6) % 130; });
}

__global__ void exchange_in_warp(float* out) {
  SHARED_ARRAY(float, s, [64]);
  const unsigned mask = threadIdx.x % 32 < 8 ? 0x000000ff : 0xffffff00;
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp(mask);
  const float other = s[threadIdx.x ^ 3];
  __syncwarp();
  s[threadIdx.x ^ 16] = other;
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x];
}
inline void run_exchange_in_warp() {
  Numbers out(64);
  launch(exchange_in_warp, {.grid = 1, .block = 64}, out.data());
  expect_each(out, [](size_t i) { return i ^ 16 ^ 3; });
}

// Of each three, x meets z before it meets y, which may have waited for it by then; in every order of the three.
__device__ float meet_twice(float value, unsigned x, unsigned y, unsigned z) {
  const unsigned lane = threadIdx.x;
  if (lane == x || lane == z) value += __shfl_xor_sync(1u << x | 1u << z, value, static_cast<int>(x ^ z));
  if (lane == x || lane == y) value += __shfl_xor_sync(1u << x | 1u << y, value, static_cast<int>(x ^ y));
  return value;
}
__global__ void chain_of_masks(float* out) {
  float value = static_cast<float>(threadIdx.x);
  value = meet_twice(value, 0, 1, 2);
  value = meet_twice(value, 5, 4, 6);
  value = meet_twice(value, 9, 10, 8);
  value = meet_twice(value, 14, 13, 12);
  out[threadIdx.x] = value;
}
inline void run_chain_of_masks() {
  Numbers out(32);
  launch(chain_of_masks, {.grid = 1, .block = 32}, out.data());
  const size_t wanted[] = {3, 3, 2, 3, 15, 15, 11, 7, 17, 27, 27, 11, 26, 39, 39, 15};
  expect_each(out, [&](size_t i) { return i < 16 ? wanted[i] : i; });
}

// The first half of the warp may be at its own shuffle before the second half has seen the result of the one of all.
__global__ void shuffles_in_a_row(float* out) {
  const unsigned lane = threadIdx.x;
  float value = __shfl_sync(0xffffffff, static_cast<float>(lane), 7);
  if (lane < 16) value += __shfl_sync(0x0000ffff, static_cast<float>(100 + lane), 7);
  out[lane] = value;
}
inline void run_shuffles_in_a_row() {
  Numbers out(32);
  launch(shuffles_in_a_row, {.grid = 1, .block = 32}, out.data());
  expect_each(out, [](size_t i) { return i < 16 ? 114 : 7; });
}

// Threads that have nothing to do leave; the masks name those that stay.
__global__ void early_exit(float* out) {
  if (threadIdx.x % 32 >= 5) return;
  const unsigned mask = __activemask() & 0b11111;
  out[threadIdx.x] = static_cast<float>(__popc(__ballot_sync(mask, 1)));
}
inline void run_early_exit() {
  Numbers out(64);
  launch(early_exit, {.grid = 1, .block = 64}, out.data());
  expect_each(out, [](size_t i) { return i % 32 < 5 ? 5 : 0; });
}

// Three buffers, filled by asynchronous copies two ahead of their use.
constexpr int kRounds = 7;
__global__ void pipeline(const float4* in, float* out) {
  SHARED_ARRAY(float4, buffers, [3][64]);
  const auto copy = [&](int round) {
    if (round < kRounds) __pipeline_memcpy_async(&buffers[round % 3][threadIdx.x], &in[round * 64 + threadIdx.x], 16);
    __pipeline_commit();
  };
  copy(0);
  copy(1);
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    copy(round + 2);
    __pipeline_wait_prior(2);
    __syncthreads();
    const float4 other = buffers[round % 3][63 - threadIdx.x];
    sum += other.x + other.y + other.z + other.w;
    __syncthreads();
  }
  out[blockIdx.x * 64 + threadIdx.x] = sum;
}
inline void run_pipeline() {
  Numbers in(kRounds * 64 * 4), out(3 * 64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i / 4 % 64);
  launch(pipeline, {.grid = 3, .block = 64}, reinterpret_cast<const float4*>(in.data()), out.data());
  expect_each(out, [](size_t i) { return 4 * kRounds * (63 - i % 64); });
}

// One lane adds for all lanes of its warp that have the same bin.
__global__ void histogram(float* counts, unsigned bins, unsigned count) {
  DYNAMIC_SHARED(storage);
  auto* of_block = reinterpret_cast<unsigned*>(storage);
  for (unsigned bin = threadIdx.x; bin < bins; bin += blockDim.x) of_block[bin] = 0;
  __syncthreads();
  for (unsigned first = blockIdx.x * blockDim.x; first < count; first += gridDim.x * blockDim.x) {
    const unsigned i = first + threadIdx.x;
    const unsigned there = __ballot_sync(0xffffffff, i < count);
    if (i < count) {
      const unsigned bin = i / 3 % bins;
      const unsigned same = __match_any_sync(there, bin);
      if (__ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x % 32)) {
        atomicAdd(&of_block[bin], __popc(same));
      }
    }
  }
  __syncthreads();
  for (unsigned bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    atomicAdd(&counts[bin], static_cast<float>(of_block[bin]));
  }
}
inline void run_histogram() {
  Numbers counts(7);
  launch(histogram, {.grid = 3, .block = 96, .shared_bytes = 7 * sizeof(unsigned)}, counts.data(), 7, 2100);
  expect_each(counts, [](size_t) { return 300; });
}

__global__ void atomics_of_all(float* out, unsigned* largest) {
  atomicAdd(out, 1.0f);
  atomicMax(largest, blockIdx.x * blockDim.x + threadIdx.x);
}
inline void run_atomics_of_all() {
  Numbers out(1);
  unsigned largest = 0;
  launch(atomics_of_all, {.grid = 3, .block = 64}, out.data(), &largest);
  expect_each(out, [&](size_t) { return 192; });
  out[0] = static_cast<float>(largest);
  expect_each(out, [&](size_t) { return 191; });
}

// Each block reads what all blocks of its cluster have in shared memory, static and dynamic.
__global__ void cluster_reduction(float* out) {
  SHARED_ARRAY(float, of_block, [1]);
  DYNAMIC_SHARED(storage);
  auto* of_thread = reinterpret_cast<float*>(storage);
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    of_thread[threadIdx.x] = static_cast<float>(blockIdx.x + round);
    __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0;
      for (unsigned i = 0; i < blockDim.x; ++i) sum += of_thread[i];
      of_block[0] = sum;
    }
    cuda::Cluster::sync();
    for (unsigned block = 0; block < cuda::Cluster::blocks(); ++block) {
      total += *cuda::Cluster::of_block(&of_block[0], block) * 1000 +
               *cuda::Cluster::of_block(&of_thread[blockDim.x - 1 - threadIdx.x], block);
    }
    cuda::Cluster::sync();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
inline void run_cluster_reduction() {
  Numbers out(4 * 40);
  launch(cluster_reduction, {.grid = 4, .block = 40, .shared_bytes = 40 * sizeof(float), .cluster = 2}, out.data());
  expect_each(out, [](size_t i) {
    const float sum = i < 80 ? 0 + 1 + 1 + 2 : 2 + 3 + 3 + 4;
    return sum * 40 * 1000 + sum;
  });
}

// A block writes to the next one.
__global__ void ring_of_blocks(float* out) {
  SHARED_ARRAY(float, inbox, [32]);
  cuda::Cluster::sync();
  const unsigned rank = cuda::Cluster::rank();
  cuda::Cluster::of_block(&inbox[0], (rank + 1) % cuda::Cluster::blocks())[threadIdx.x] = static_cast<float>(rank);
  cuda::Cluster::sync();
  out[blockIdx.x * 32 + threadIdx.x] = inbox[31 - threadIdx.x];
}
inline void run_ring_of_blocks() {
  Numbers out(16 * 32);
  launch(ring_of_blocks, {.grid = 16, .block = 32, .cluster = 16}, out.data());
  expect_each(out, [](size_t i) { return (i / 32 + 15) % 16; });
}

inline const std::vector<Case> kCleanKernels = {
    clean("block_reduction", run_block_reduction<2, 64>),
    // More threads than the runtime has for the thread sanitizer.
    clean("block_reduction", run_block_reduction<10, 256>),
    clean("shift_by_one", run_shift_by_one),
    clean("exchange_in_warp", run_exchange_in_warp),
    clean("chain_of_masks", run_chain_of_masks),
    clean("shuffles_in_a_row", run_shuffles_in_a_row),
    clean("early_exit", run_early_exit),
    clean("pipeline", run_pipeline),
    clean("histogram", run_histogram),
    clean("atomics_of_all", run_atomics_of_all),
    clean("cluster_reduction", run_cluster_reduction),
    clean("ring_of_blocks", run_ring_of_blocks),
};

}  // namespace monosoftmax::test
