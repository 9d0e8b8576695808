// Computes the table of a PLIF from its raw slopes, and the gradient of the raw slopes, in one kernel each.
// PLIF.coefficients() and autograd would take a dozen kernels (monosoftmax/transforms/plif.py).
//
//   plif_coefficients_kernel           [2, K]: the slopes, and the values at the left ends of the pieces
//   plif_coefficients_backward_kernel  the gradient of the raw slopes, from the gradient of the table
//
// One block goes outwards from the piece that contains 0, or towards it. In each step, each thread takes one piece. A
// step is a prefix sum over the block, to which the sum of the steps before is added.
//
// Memory traffic: each number of the arguments is read once, and each number of the result is written once. Forward
// reads the raw slope of the centre once more. No memory grows with K.
//
// Numerics: softplus and slopes are in float32, sums in float64 and rounded once. The order of the sums depends only on
// K and the number of threads, so that sums are the same in every run.
//
// Hazards: all threads take the same number of steps, with one barrier in each. BlockScan alternates between two halves
// of its memory: a half is written again only after every thread has passed the barrier that follows the reading of
// this half. The results must not overlap the arguments.
#pragma once

#include "reduce.cuh"

namespace monosoftmax::cuda {

constexpr int kMostThreadsOfPlif = kMostWarps * kWarp;

// Prefix sums over the threads of a block, in double.
class BlockScan {
 public:
  struct Memory {
    double of_warps[2][kMostWarps];
  };
  struct Result {
    double sum;    // over the threads up to this one
    double total;  // over all
  };

  explicit __device__ BlockScan(Memory& memory) : memory_(memory) {}
  __device__ Result operator()(double x) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    double (&of_warps)[kMostWarps] = memory_.of_warps[half_];
    half_ = 1 - half_;
    const double in_warp = scan_warp(x, lane);
    if (lane == kWarp - 1) of_warps[warp] = in_warp;
    __syncthreads();
    const double up_to_warp = scan_warp(lane < warps ? of_warps[lane] : 0.0, lane);
    const double before = __shfl_sync(kAllLanes, up_to_warp, warp == 0 ? 0 : warp - 1);
    return {warp == 0 ? in_warp : before + in_warp, __shfl_sync(kAllLanes, up_to_warp, warps - 1)};
  }

 private:
  static __device__ double scan_warp(double x, int lane) {
    MONOSOFTMAX_UNROLL for (int distance = 1; distance < kWarp; distance *= 2) {
      const double before = __shfl_up_sync(kAllLanes, x, distance);
      if (lane >= distance) x += before;
    }
    return x;
  }

  Memory& memory_;
  int half_ = 0;
};

// Calls visitor(k, sum of the terms of the pieces up to k) for `count` pieces first, first + direction, ..., in the
// order of their threads. Returns the sum over all of them. All threads of the block must call this function.
template <class Term, class Visitor>
__device__ double scan_pieces(BlockScan& scan, int64_t first, int direction, int64_t count, Term&& term,
                              Visitor&& visitor) {
  double carry = 0;
  for (int64_t begin = 0; begin < count; begin += blockDim.x) {
    const int64_t i = begin + threadIdx.x, k = first + direction * i;
    const BlockScan::Result result = scan(i < count ? term(k) : 0.0);
    if (i < count) visitor(k, carry + result.sum);
    carry += result.total;
  }
  return carry;
}

// Beyond this, softplus is the identity, as in torch.
constexpr float kSoftplusThreshold = 20;

__device__ inline float unclamped_slope(const PlifArguments& arguments, float raw) {
  const float softplus = raw > kSoftplusThreshold ? raw : log1pf(expf(raw));
  return arguments.min_slope + arguments.scale * softplus;
}

__device__ inline float slope_of(const PlifArguments& arguments, int64_t k) {
  const float slope = unclamped_slope(arguments, arguments.raw_slope[k]);
  return slope > static_cast<float>(kMostSlope) ? static_cast<float>(kMostSlope) : slope;  // NaN stays
}

__global__ void __launch_bounds__(kMostThreadsOfPlif) plif_coefficients_kernel(const PlifArguments arguments) {
  SHARED_ARRAY(BlockScan::Memory, memory, [1]);
  BlockScan scan(memory[0]);
  const PlifGrid& grid = arguments.grid;
  float *const slope = arguments.coefficients, *const value = slope + grid.pieces;
  const double at_centre = -static_cast<double>(slope_of(arguments, grid.centre)) * grid.inside;
  if (threadIdx.x == 0) value[grid.centre] = static_cast<float>(at_centre);
  const auto rise = [&](int64_t k) {
    slope[k] = slope_of(arguments, k);
    return static_cast<double>(slope[k]) * grid.width;
  };
  scan_pieces(scan, grid.centre - 1, -1, grid.centre, rise,
              [&](int64_t k, double sum) { value[k] = static_cast<float>(at_centre - sum); });
  scan_pieces(scan, grid.centre, 1, grid.pieces - grid.centre, rise, [&](int64_t k, double sum) {
    if (k + 1 < grid.pieces) value[k + 1] = static_cast<float>(at_centre + sum);
  });
}

// Writes the gradient of the raw slope of a piece, from the gradient of its slope.
__device__ inline void write_gradient(const PlifArguments& arguments, int64_t k, float of_slope) {
  const float raw = arguments.raw_slope[k];
  const float unclamped = unclamped_slope(arguments, raw), power = expf(raw);
  const float derivative = raw > kSoftplusThreshold ? 1 : power / (power + 1);
  arguments.grad_raw_slope[k] =
      unclamped <= static_cast<float>(kMostSlope) ? of_slope * arguments.scale * derivative : 0;
}

__global__ void __launch_bounds__(kMostThreadsOfPlif) plif_coefficients_backward_kernel(const PlifArguments arguments) {
  SHARED_ARRAY(BlockScan::Memory, memory, [1]);
  BlockScan scan(memory[0]);
  const PlifGrid& grid = arguments.grid;
  const float *const of_slope = arguments.grad_coefficients, *const of_value = of_slope + grid.pieces;
  const auto write = [&](int64_t k, double of_rise) {
    write_gradient(arguments, k, of_slope[k] + static_cast<float>(of_rise * grid.width));
  };
  // The value at a knot depends on every slope between the knot and 0. So the gradient of a slope adds up the gradients
  // of all values beyond it.
  const double left =
      scan_pieces(scan, 0, 1, grid.centre, [&](int64_t k) { return -static_cast<double>(of_value[k]); }, write);
  const double right = scan_pieces(
      scan, grid.pieces - 1, -1, grid.pieces - grid.centre,
      [&](int64_t k) { return k + 1 < grid.pieces ? static_cast<double>(of_value[k + 1]) : 0.0; },
      [&](int64_t k, double sum) {
        if (k != grid.centre) write(k, sum);
      });
  if (threadIdx.x != 0) return;
  const double of_centre = static_cast<double>(of_value[grid.centre]) + right - left;
  write_gradient(
      arguments, grid.centre,
      of_slope[grid.centre] + static_cast<float>(-(of_centre * grid.inside)) + static_cast<float>(right * grid.width));
}

}  // namespace monosoftmax::cuda
