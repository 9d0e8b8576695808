// CUDA's arithmetic intrinsics. Rounding down is computed from an exact error term, since compilers do not honour a
// rounding mode that a program sets.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

constexpr int __float_as_int(float x) { return std::bit_cast<int>(x); }
constexpr unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
constexpr float __int_as_float(int x) { return std::bit_cast<float>(x); }
constexpr float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

namespace monosoftmax::cuda::host {

// Not std::nextafter: it is slow, and raises floating-point exceptions.
constexpr float next_below(float x) {
  if (x == 0) return -std::numeric_limits<float>::denorm_min();
  return std::bit_cast<float>(std::bit_cast<int32_t>(x) + (x > 0 ? -1 : 1));
}

// a + b, rounded towards minus infinity. Each of a and b is a float or a product of two floats, so that their sum does
// not overflow, and two doubles hold it exactly.
inline float sum_rounded_down(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  // Rounded down, a sum of 0 is -0, unless both terms are +0.
  if (sum == 0) return std::signbit(a) || std::signbit(b) ? -0.0f : 0.0f;
  const double part_of_b = sum - a;
  const double error = (a - (sum - part_of_b)) + (b - part_of_b);
  const float nearest = static_cast<float>(sum);
  return nearest > sum || (nearest == sum && error < 0) ? next_below(nearest) : nearest;
}

inline float flush_subnormal(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

}  // namespace monosoftmax::cuda::host

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmaf_rd(float a, float b, float c) {
  return monosoftmax::cuda::host::sum_rounded_down(static_cast<double>(a) * b, c);
}
constexpr float __fadd_rn(float a, float b) { return a + b; }
inline float __fadd_rd(float a, float b) { return monosoftmax::cuda::host::sum_rounded_down(a, b); }
constexpr float __fmul_rn(float a, float b) { return a * b; }
constexpr float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // 0 for NaN
// As in CUDA, the reciprocal of a divisor beyond 2^126 is flushed to 0.
inline float __fdividef(float a, float b) {
  const float magnitude = std::fabs(b);
  return magnitude > 0x1p126f && !std::isinf(magnitude) ? a * std::copysign(0.0f, b) : a / b;
}

constexpr int __vimax_s32_relu(int a, int b) { return a > b ? (a > 0 ? a : 0) : (b > 0 ? b : 0); }
constexpr int __vimin_s32_relu(int a, int b) { return a < b ? (a > 0 ? a : 0) : (b > 0 ? b : 0); }

constexpr int max(int a, int b) { return a > b ? a : b; }
constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
constexpr unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
constexpr long max(long a, long b) { return a > b ? a : b; }
constexpr long min(long a, long b) { return a < b ? a : b; }
constexpr unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
constexpr unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
constexpr long long max(long long a, long long b) { return a > b ? a : b; }
constexpr long long min(long long a, long long b) { return a < b ? a : b; }
constexpr unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
constexpr unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }

constexpr int __popc(unsigned x) { return std::popcount(x); }
constexpr int __popcll(unsigned long long x) { return std::popcount(x); }
constexpr int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
constexpr int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
constexpr int __ffs(int x) { return x == 0 ? 0 : 1 + std::countr_zero(static_cast<unsigned>(x)); }
constexpr int __ffsll(long long x) { return x == 0 ? 0 : 1 + std::countr_zero(static_cast<unsigned long long>(x)); }
constexpr unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
  return x >> 24 | (x >> 8 & 0xff00) | (x & 0xff00) << 8 | x << 24;
}

namespace monosoftmax::cuda {

// Like the instructions of the kernels, these flush subnormal operands and results to 0.
inline float exp2_approximate(float x) { return host::flush_subnormal(std::exp2(host::flush_subnormal(x))); }
inline float log2_approximate(float x) { return std::log2(host::flush_subnormal(x)); }
inline float reciprocal_approximate(float x) { return host::flush_subnormal(1 / host::flush_subnormal(x)); }

}  // namespace monosoftmax::cuda
