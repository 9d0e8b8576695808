// What the host build offers to kernels and to who launches them: indices, collectives, atomic operations, asynchronous
// copies, clusters, shapes of launches, statistics.
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../check.h"
#include "cuda/platform.h"
#include "orders.h"

namespace monosoftmax::test {
namespace {

using namespace cuda::host;

constexpr unsigned kAll = 0xffffffff;

// The results of one warp, number by number for each lane.
template <class T, auto kernel>
std::vector<T> of_warp(unsigned numbers) {
  std::vector<T> out(size_t{numbers} * 32);
  launch(kernel, {.grid = 1, .block = 32}, out.data());
  return out;
}

__global__ void indices_kernel(uint3* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = make_uint3(block, thread, warpSize);
}

void test_indices() {
  std::vector<uint3> out(2 * 3 * 4 * 5 * 3 * 2);
  launch(indices_kernel, {.grid = dim3(2, 3, 4), .block = dim3(5, 3, 2)}, out.data());
  bool right = true;
  for (unsigned i = 0; i < out.size(); ++i) right &= out[i].x == i / 30 && out[i].y == i % 30 && out[i].z == 32;
  CHECK(right);
}

__global__ void shuffles_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* mine = out + lane * 8;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 37, 8);
  mine[2] = __shfl_xor_sync(kAll, lane, 12);
  mine[3] = __shfl_xor_sync(kAll, lane, 12, 8);
  mine[4] = __shfl_up_sync(kAll, lane, 3);
  mine[5] = __shfl_up_sync(kAll, lane, 3, 16);
  mine[6] = __shfl_down_sync(kAll, lane, 3);
  mine[7] = __shfl_down_sync(kAll, lane, 3, 16);
}

__global__ void shuffled_types_kernel(double* out) {
  const auto number = static_cast<double>(threadIdx.x) + 0.25;
  const double a = __shfl_xor_sync(kAll, number, 1);
  const auto b = __shfl_xor_sync(kAll, static_cast<unsigned long long>(threadIdx.x) << 40, 1);
  const __half2 c = __shfl_xor_sync(kAll, __floats2half2_rn(static_cast<float>(threadIdx.x), 1), 1);
  out[threadIdx.x] = a + static_cast<double>(b >> 40) * 100 + static_cast<double>(__low2float(c)) * 10000;
}

// As CUDA says: in __shfl_xor_sync() a lane of an earlier segment may be read, of a later one not.
void test_shuffles() {
  const auto out = of_warp<int, shuffles_kernel>(8);
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int* mine = &out[static_cast<size_t>(lane) * 8];
    right &= mine[0] == 5 && mine[1] == lane / 8 * 8 + 5 && mine[2] == (lane ^ 12);
    right &= mine[3] == ((lane ^ 12) <= (lane | 7) ? lane ^ 12 : lane);
    right &= mine[4] == (lane < 3 ? lane : lane - 3) && mine[5] == (lane % 16 < 3 ? lane : lane - 3);
    right &= mine[6] == (lane > 28 ? lane : lane + 3) && mine[7] == (lane % 16 > 12 ? lane : lane + 3);
  }
  CHECK(right);
  const auto types = of_warp<double, shuffled_types_kernel>(1);
  for (size_t i = 0; i < 32; ++i) right &= types[i] == static_cast<double>(i ^ 1) * 10101 + 0.25;
  CHECK(right);
}

__global__ void votes_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  unsigned* mine = out + lane * 10;
  const unsigned mask = lane < 20 ? 0x000fffff : 0xfff00000;
  mine[0] = __ballot_sync(mask, lane % 3 == 0);
  mine[1] = static_cast<unsigned>(__any_sync(mask, lane == 3));
  mine[2] = static_cast<unsigned>(__all_sync(mask, lane < 20));
  mine[3] = __match_any_sync(mask, lane % 5);
  mine[4] = __match_any_sync(mask, static_cast<long long>(lane % 2) << 35);
  mine[5] = __activemask();
  mine[6] = __reduce_add_sync(mask, lane);
  mine[7] = static_cast<unsigned>(__reduce_add_sync(mask, -static_cast<int>(lane)));
  mine[8] = __reduce_max_sync(mask, lane - 2);  // of the first two: huge
  mine[9] = static_cast<unsigned>(__reduce_max_sync(mask, static_cast<int>(lane) - 40));
  __syncwarp();  // so that none has ended when another one asks who is there
}

void test_votes() {
  reset_match_statistics();
  const auto out = of_warp<unsigned, votes_kernel>(10);
  bool right = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned* mine = &out[lane * 10];
    const bool first = lane < 20;
    const unsigned mask = first ? 0x000fffff : 0xfff00000;
    unsigned thirds = 0, same = 0, parity = 0;
    for (unsigned i = 0; i < 32; ++i) {
      thirds |= (i % 3 == 0) << i;
      same |= (i % 5 == lane % 5 ? 1u : 0u) << i;
      parity |= (i % 2 == lane % 2 ? 1u : 0u) << i;
    }
    right &= mine[0] == (thirds & mask) && mine[1] == first && mine[2] == first;
    right &= mine[3] == (same & mask) && mine[4] == (parity & mask) && mine[5] == kAll;
    right &= mine[6] == (first ? 190u : 306u) && mine[7] == -(first ? 190u : 306u);
    right &= mine[8] == (first ? 0xffffffffu : 29u) && mine[9] == (first ? -21u : -9u);
  }
  CHECK(right);
  CHECK(match_statistics().calls == 64 && match_statistics().groups == 5 + 5 + 2 + 2);
  reset_match_statistics();
  CHECK(match_statistics().calls == 0 && match_statistics().groups == 0);
}

__global__ void barriers_kernel(int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  out[thread * 5] = __syncthreads_or(thread == 17);
  out[thread * 5 + 1] = __syncthreads_or(0);
  out[thread * 5 + 2] = __syncthreads_and(thread < 100);
  out[thread * 5 + 3] = __syncthreads_and(thread != 17);
  out[thread * 5 + 4] = __syncthreads_count(thread % 4);
}

void test_barriers() {
  std::vector<int> out(100 * 5);
  launch(barriers_kernel, {.grid = 1, .block = 100}, out.data());
  bool right = true;
  for (size_t i = 0; i < out.size(); ++i) right &= out[i] == std::vector<int>{1, 0, 1, 0, 75}[i % 5];
  CHECK(right);
}

struct Counters {
  int sum, largest, smallest;
  unsigned exchanged, compared;
  unsigned long long wide;
  float real;
  double precise;
};
__global__ void atomics_kernel(Counters* counters) {
  const int i = static_cast<int>(threadIdx.x);
  atomicAdd(&counters->sum, i);
  atomicMax(&counters->largest, i);
  atomicMin(&counters->smallest, -i);
  atomicExch(&counters->exchanged, 7u);
  if (atomicCAS(&counters->compared, 0u, threadIdx.x + 1) == 0) atomicAdd(&counters->wide, 1ull << 40);
  atomicAdd(&counters->real, 0.5f);
  atomicAdd(&counters->precise, 0.25);
}

void test_atomics() {
  Counters counters{};
  launch(atomics_kernel, {.grid = 1, .block = 64}, &counters);
  CHECK(counters.sum == 2016 && counters.largest == 63 && counters.smallest == -63);
  CHECK(counters.exchanged == 7 && counters.compared > 0 && counters.compared <= 64);
  CHECK(counters.wide == 1ull << 40 && counters.real == 32 && counters.precise == 16);
}

// Groups of copies land one after another, each at the wait that is for it.
__global__ void copies_kernel(const float* in, float* out, bool* in_order) {
  SHARED_ARRAY(float4, a, [1]);
  SHARED_ARRAY(float2, b, [1]);
  SHARED_ARRAY(float, c, [2]);
  __pipeline_memcpy_async(a, in, 16);
  __pipeline_commit();
  __pipeline_memcpy_async(b, in + 4, 8, 3);
  __pipeline_commit();
  __pipeline_commit();  // of nothing
  __pipeline_memcpy_async(&c[0], in + 8, 4);
  __pipeline_memcpy_async(&c[1], in + 9, 4, 4);
  __pipeline_commit();
  const auto landed = [&](bool first, bool second, bool third) {
    return std::isnan(a[0].x) != first && std::isnan(b[0].x) != second && std::isnan(c[0]) != third;
  };
  *in_order = landed(false, false, false);
  __pipeline_wait_prior(4);
  *in_order &= landed(false, false, false);
  __pipeline_wait_prior(3);
  *in_order &= landed(true, false, false);
  __pipeline_wait_prior(1);
  *in_order &= landed(true, true, false);
  __pipeline_wait_prior(1);
  *in_order &= landed(true, true, false);
  __pipeline_wait_prior(0);
  *in_order &= landed(true, true, true);
  out[0] = a[0].w;
  out[1] = b[0].x;
  std::memcpy(&out[2], &b[0].y, sizeof(float));
  out[3] = c[0];
  out[4] = c[1];
}

void test_async_copies() {
  alignas(16) float in[10];
  for (int i = 0; i < 10; ++i) in[i] = static_cast<float>(i) + 1.0f / 3;
  float out[5];
  bool in_order = false;
  launch(copies_kernel, {.grid = 1, .block = 1}, in, out, &in_order);
  CHECK(in_order);
  CHECK(out[0] == in[3] && out[1] == in[4] && out[3] == in[8] && out[4] == 0);
  CHECK(__float_as_uint(out[2]) == (__float_as_uint(in[5]) & 0xff));  // the last 3 of 8 bytes are zeros
}

// Each instantiation and each place has an array of its own, of its own size.
template <int N>
__device__ unsigned char* array_of() {
  SHARED_ARRAY(unsigned char, bytes, [N]);
  return bytes;
}
__global__ void arrays_kernel(uintptr_t* out) {
  SHARED_ARRAY(float4, vectors, [3]);
  SHARED_ARRAY(double, scalar, );
  DYNAMIC_SHARED(dynamic);
  const void* arrays[] = {vectors, &scalar, dynamic, array_of<3>(), array_of<200>(), array_of<3>()};
  for (size_t i = 0; i < std::size(arrays); ++i) out[i] = reinterpret_cast<uintptr_t>(arrays[i]);
}

void test_shared_arrays() {
  uintptr_t at[6];
  launch(arrays_kernel, {.grid = 1, .block = 1, .shared_bytes = 64}, at);
  CHECK(at[3] == at[5]);
  CHECK(std::set<uintptr_t>(at, at + 5).size() == 5);
  CHECK(at[0] % 16 == 0 && at[0] % 32 != 0 && at[1] % 8 == 0 && at[2] % 16 == 0 && at[2] % 32 != 0);
}

__global__ void cluster_kernel(unsigned* out) {
  SHARED_ARRAY(unsigned, rank, [1]);
  if (threadIdx.x == 0) rank[0] = cuda::Cluster::rank();
  cuda::Cluster::sync();
  unsigned ranks = 0;
  for (unsigned block = 0; block < cuda::Cluster::blocks(); ++block) {
    ranks = ranks * 10 + *cuda::Cluster::of_block(&rank[0], block);
  }
  cuda::Cluster::sync();
  if (threadIdx.x == 39) out[blockIdx.x + gridDim.x * blockIdx.y] = ranks * 10 + cuda::Cluster::rank();
}

void test_clusters() {
  std::vector<unsigned> out(12);
  launch(cluster_kernel, {.grid = dim3(6, 2), .block = 40, .cluster = 3}, out.data());
  for (unsigned i = 0; i < out.size(); ++i) CHECK(out[i] == 120 + i % 3);
  launch(cluster_kernel, {.grid = dim3(6, 2), .block = 40}, out.data());
  for (unsigned i = 0; i < out.size(); ++i) CHECK(out[i] == 0);
}

__global__ void largest_cluster_kernel(unsigned* sum) {
  cuda::Cluster::sync();
  if (threadIdx.x == 0) atomicAdd(sum, cuda::Cluster::rank());
}

void test_largest_cluster() {
  const unsigned threads = kBuild == Build::kThread ? 128 : 1024;
  unsigned sum = 0;
  launch(largest_cluster_kernel, {.grid = 16, .block = threads, .cluster = 16}, &sum);
  CHECK(sum == 120);
}

__global__ void nothing_kernel(int) {}

std::string refusal(const LaunchShape& shape) {
  try {
    launch(nothing_kernel, shape, 1);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void test_shapes() {
  CHECK(refusal({.grid = 1, .block = 1}).empty());
  CHECK(refusal({.grid = 1, .block = 1024}).empty());
  CHECK(refusal({.grid = 1, .block = dim3(16, 8, 8)}).empty());
  CHECK(refusal({.grid = 1, .block = 1, .shared_bytes = 227 << 10}).empty());
  CHECK(refusal({.grid = 0, .block = 1}) ==
        "invalid launch: grid of (0, 1, 1) blocks, at most (2147483647, 65535, 65535)");
  CHECK(!refusal({.grid = dim3(1, 65536), .block = 1}).empty());
  CHECK(!refusal({.grid = 1, .block = 0}).empty());
  CHECK(!refusal({.grid = 1, .block = 1025}).empty());
  CHECK(!refusal({.grid = 1, .block = dim3(32, 33)}).empty());
  CHECK(!refusal({.grid = 1, .block = dim3(1, 1, 65)}).empty());
  CHECK(refusal({.grid = 1, .block = 1, .shared_bytes = (227 << 10) + 1}) ==
        "invalid launch: dynamic shared memory of 232449 bytes, at most 232448");
  CHECK(!refusal({.grid = 6, .block = 1, .cluster = 4}).empty());
  CHECK(!refusal({.grid = 17, .block = 1, .cluster = 17}).empty());
  CHECK(!refusal({.grid = 1, .block = 1, .cluster = 0}).empty());

  set_shared_limit(99 << 10);
  CHECK(refusal({.grid = 1, .block = 1, .shared_bytes = 99 << 10}).empty());
  CHECK(!refusal({.grid = 1, .block = 1, .shared_bytes = (99 << 10) + 1}).empty());
  set_shared_limit(227 << 10);
  bool refused = false;
  try {
    set_shared_limit(228 << 10);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

__global__ void order_kernel(int* order, int* next) {
  for (int round = 0; round < 2; ++round) {
    order[atomicAdd(next, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    __syncthreads();
  }
}

std::vector<int> order_of(Order order, unsigned seed) {
  std::vector<int> ran(2 * 3 * 70);
  int next = 0;
  set_order(order, seed);
  launch(order_kernel, {.grid = 3, .block = 70}, ran.data(), &next);
  set_order(Order::kForward);
  return ran;
}

void test_orders() {
  const auto forward = order_of(Order::kForward, 1), reverse = order_of(Order::kReverse, 1);
  const auto random = order_of(Order::kRandom, 1);
  bool right = true;
  for (int i = 0; i < 420; ++i) {
    const int thread = i / 140 * 70 + i % 70;
    right &= forward[static_cast<size_t>(i)] == thread && reverse[static_cast<size_t>(i)] == 209 - thread;
  }
  CHECK(right);
  CHECK(random != forward && random != reverse);
  CHECK(random == order_of(Order::kRandom, 1) && random != order_of(Order::kRandom, 2));
  CHECK(std::multiset<int>(random.begin(), random.end()) == std::multiset<int>(forward.begin(), forward.end()));
}

__global__ void traffic_kernel() {
  MONOSOFTMAX_GLOBAL_READ(16);
  MONOSOFTMAX_GLOBAL_WRITE(2);
}

void test_traffic() {
  reset_traffic();
  launch(traffic_kernel, {.grid = 3, .block = 50});
  CHECK(traffic().bytes_read == 2400 && traffic().bytes_written == 300);
  reset_traffic();
  CHECK(traffic().bytes_read == 0 && traffic().bytes_written == 0);
}

__global__ void converted_arguments_kernel(float* out, long long wide, float real, dim3 extent) {
  out[0] = static_cast<float>(wide) + real + static_cast<float>(extent.y);
}

void test_arguments() {
  float out = 0;
  launch(converted_arguments_kernel, {.grid = 1, .block = 1}, &out, 1, 0.5, dim3(1, 2));
  CHECK(out == 3.5f);
}

}  // namespace
}  // namespace monosoftmax::test

int main() {
  using namespace monosoftmax::test;
  in_every_order([] {
    test_indices();
    test_shuffles();
    test_votes();
    test_barriers();
    test_atomics();
    test_async_copies();
    test_shared_arrays();
    test_clusters();
    test_traffic();
    test_arguments();
  });
  test_largest_cluster();
  test_shapes();
  test_orders();
  return failures;
}
