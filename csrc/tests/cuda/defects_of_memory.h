// Addresses that a kernel has no business with, and memory that it reads too early.
#pragma once

#include "cases.h"

namespace monosoftmax::test {

constexpr unsigned kAll = 0xffffffff;

__global__ void static_write_out_of_bounds(float* out) {
  SHARED_ARRAY(float, s, [64]);
  float* mine = s + threadIdx.x;
  mine[1] = 1;
  __syncthreads();
  out[threadIdx.x] = threadIdx.x == 0 ? 0 : s[threadIdx.x];
}

__global__ void static_read_out_of_bounds(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  __syncthreads();
  const float* mine = s + threadIdx.x;
  out[threadIdx.x] = mine[1];
}

__global__ void static_index_out_of_bounds(float* out) {
  SHARED_ARRAY(float, s, [8][8]);
  s[threadIdx.x / 8][threadIdx.x % 8] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x / 8][threadIdx.x % 8 + 1];  // of the next row, but for the last one
}

__global__ void dynamic_write_out_of_bounds(float* out) {
  DYNAMIC_SHARED(storage);
  auto* s = reinterpret_cast<float*>(storage);
  s[threadIdx.x] = 0;
  if (threadIdx.x == 63) s[64] = 1;
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void dynamic_write_before_begin(float* out) {
  DYNAMIC_SHARED(storage);
  auto* s = reinterpret_cast<float*>(storage);
  s[threadIdx.x] = 0;
  if (threadIdx.x == 0) s[static_cast<int>(threadIdx.x) - 1] = 1;
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void dynamic_read_out_of_bounds(float* out) {
  DYNAMIC_SHARED(storage);
  auto* s = reinterpret_cast<float*>(storage);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void global_read_out_of_bounds(float* out) {
  const float next = out[threadIdx.x + 1];
  __syncthreads();
  out[threadIdx.x] = next;
}

__global__ void global_write_out_of_bounds(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void uninitialized_shared(float* out) {
  SHARED_ARRAY(float, s, [65]);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void misaligned_vector(float* out) {
  const float4 vector = *reinterpret_cast<const float4*>(out + threadIdx.x % 4);
  __syncthreads();
  out[threadIdx.x] = vector.x;
}

// The array is aligned as floats are: where a vector may begin is up to what else is in shared memory.
__global__ void misaligned_vector_in_shared(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<const float4*>(s)[threadIdx.x / 4].x;
}

__global__ void overflow_in_offset(float* out, int rows, int columns) {
  const int64_t end = rows * columns;
  out[threadIdx.x] = static_cast<float>(end);
}
inline void run_overflow_in_offset() {
  Numbers out(64);
  launch(overflow_in_offset, {.grid = 1, .block = 64}, out.data(), 100000, 100000);
}

__global__ void too_much_static(float* out) {
  SHARED_ARRAY(float, s, [32 << 8]);
  SHARED_ARRAY(float, t, [32 << 8]);
  s[threadIdx.x] = t[threadIdx.x] = 1;
  out[threadIdx.x] = s[threadIdx.x] + t[threadIdx.x];
}

__global__ void too_much_together(float* out) {
  SHARED_ARRAY(float, s, [64]);
  s[threadIdx.x] = 1;
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void read_before_wait(float* out) {
  SHARED_ARRAY(float, s, [64]);
  __pipeline_memcpy_async(&s[threadIdx.x], &out[threadIdx.x], 4);
  __pipeline_commit();
  const float early = s[threadIdx.x];
  __pipeline_wait_prior(0);
  out[threadIdx.x] = early;
}

__global__ void read_before_commit(float* out) {
  SHARED_ARRAY(float, s, [64]);
  __pipeline_memcpy_async(&s[threadIdx.x], &out[threadIdx.x], 4);
  __pipeline_wait_prior(0);  // waits for what was committed: nothing
  const float early = s[threadIdx.x];
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = early;
}

__global__ void wait_for_too_few_copies(float* out) {
  SHARED_ARRAY(float, s, [2][64]);
  for (int i = 0; i < 2; ++i) {
    __pipeline_memcpy_async(&s[i][threadIdx.x], &out[threadIdx.x], 4);
    __pipeline_commit();
  }
  __pipeline_wait_prior(1);
  const float early = s[1][threadIdx.x];
  __pipeline_wait_prior(0);
  out[threadIdx.x] = early;
}

__global__ void no_wait_at_end(float* out) {
  SHARED_ARRAY(float, s, [64]);
  __pipeline_memcpy_async(&s[threadIdx.x], &out[threadIdx.x], 4);
  __pipeline_commit();
}

__global__ void misaligned_copy(float* out) {
  SHARED_ARRAY(float4, s, [64]);
  __pipeline_memcpy_async(&s[threadIdx.x], &out[threadIdx.x % 8], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

__global__ void copy_of_odd_size(float* out) {
  SHARED_ARRAY(float4, s, [64]);
  __pipeline_memcpy_async(&s[threadIdx.x], &out[0], 12);
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

__global__ void copy_to_global(float* out) {
  __pipeline_memcpy_async(&out[threadIdx.x], &out[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

__global__ void copy_from_out_of_bounds(float* out) {
  SHARED_ARRAY(float, s, [64]);
  __pipeline_memcpy_async(&s[threadIdx.x], &out[threadIdx.x + 1], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

__global__ void copy_to_out_of_bounds(float* out) {
  SHARED_ARRAY(float, s, [64]);
  float* mine = s + threadIdx.x;
  __pipeline_memcpy_async(mine + 1, &out[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

inline const std::vector<Case> kDefectsOfMemory = {
    {"static_write_out_of_bounds", run<static_write_out_of_bounds>, "0 bytes behind the end of s", kPoison,
     "0 bytes behind the end of s"},
    {"static_read_out_of_bounds", run<static_read_out_of_bounds>, kNaN, kPoison, kNaN},
    {"static_index_out_of_bounds", run<static_index_out_of_bounds>, kNaN, "index 8 out of bounds", kNaN},
    {"dynamic_write_out_of_bounds", run<dynamic_write_out_of_bounds, 1, 64, 256>,
     "0 bytes behind the end of the dynamic part", kPoison, "0 bytes behind the end of the dynamic part"},
    {"dynamic_write_before_begin", run<dynamic_write_before_begin, 1, 64, 256>, "1 bytes before the dynamic part",
     kPoison, "1 bytes before the dynamic part"},
    {"dynamic_read_out_of_bounds", run<dynamic_read_out_of_bounds, 1, 64, 256>, kNaN, kPoison, kNaN},
    {"global_read_out_of_bounds", run<global_read_out_of_bounds>, kUnseen, kOverflow, kUnseen},
    {"global_write_out_of_bounds", run<global_write_out_of_bounds>, kUnseen, kOverflow, kUnseen},
    everywhere("uninitialized_shared", run<uninitialized_shared>, kNaN),
    {"misaligned_vector", run<misaligned_vector>, kUnseen, "misaligned address", kUnseen},
    {"misaligned_vector_in_shared", run<misaligned_vector_in_shared>, kUnseen, "misaligned address", kUnseen},
    {"overflow_in_offset", run_overflow_in_offset, kUnseen, "signed integer overflow", kUnseen},
    everywhere("too_much_static", run<too_much_static>, "65536 bytes of static shared memory, at most 49152"),
    everywhere("too_much_together", run<too_much_together, 1, 64, 227 << 10>,
               "256 bytes of static and 232448 of dynamic shared memory, together at most 232448"),
    everywhere("read_before_wait", run<read_before_wait>, kNaN),
    everywhere("read_before_commit", run<read_before_commit>, kNaN),
    everywhere("wait_for_too_few_copies", run<wait_for_too_few_copies>, kNaN),
    everywhere("no_wait_at_end", run<no_wait_at_end>, "exited with 1 asynchronous copies in flight"),
    everywhere("misaligned_copy", run<misaligned_copy>, "copy of 16 bytes from a misaligned address"),
    everywhere("copy_of_odd_size", run<copy_of_odd_size>, "copy of 12 bytes, rather than 4, 8 or 16"),
    everywhere("copy_to_global", run<copy_to_global>, "not in the shared memory of this block"),
    {"copy_from_out_of_bounds", run<copy_from_out_of_bounds>, kUnseen, kOverflow, kUnseen},
    {"copy_to_out_of_bounds", run<copy_to_out_of_bounds>, "0 bytes behind the end of s", kPoison,
     "0 bytes behind the end of s"},
};

}  // namespace monosoftmax::test
