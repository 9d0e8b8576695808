// bfloat16 and half precision as in <cuda_bf16.h> and <cuda_fp16.h>: storage, conversions and maxima. All arithmetic is
// on integers, so that results depend neither on instruction sets nor on a flush-to-zero mode of the process.
#pragma once

#include <bit>
#include <cstdint>

#include "vector_types.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

constexpr __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
constexpr unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
constexpr __half __ushort_as_half(unsigned short bits) { return {bits}; }
constexpr unsigned short __half_as_ushort(__half value) { return value.bits; }

constexpr float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

constexpr float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = value.bits >> 10 & 31;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // mantissa 2^-24: exact, and normal in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31 && mantissa != 0) return std::bit_cast<float>(0x7fffffffu);
  const uint32_t rebiased = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | rebiased << 23 | mantissa << 13);
}

namespace monosoftmax::cuda::host {

// value / 2^shift, rounded to nearest even; 0 < shift < 32.
constexpr uint32_t shift_right_rounded(uint32_t value, unsigned shift) {
  const uint32_t quotient = value >> shift;
  const uint32_t remainder = value & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return quotient + (remainder > half || (remainder == half && (quotient & 1)));
}

inline constexpr uint16_t kHalfNaN = 0x7fff;  // the NaN of CUDA's conversions and maxima, for both types

}  // namespace monosoftmax::cuda::host

constexpr __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {monosoftmax::cuda::host::kHalfNaN};
  // The carry of the rounding moves into the exponent, up to infinity, as it should.
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
constexpr __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

constexpr __half __float2half_rn(float value) {
  using monosoftmax::cuda::host::shift_right_rounded;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return {monosoftmax::cuda::host::kHalfNaN};
  uint32_t result = 0;
  if (magnitude >= 0x47800000) {  // 2^16 and above. Numbers that round up to 2^16 become infinity by the carry.
    result = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2^-14, the smallest normal value, and above
    result = shift_right_rounded(magnitude - ((127 - 15) << 23), 13);
  } else if (magnitude > 0x33000000) {  // above 2^-25, half of the smallest subnormal value
    result = shift_right_rounded((magnitude & 0x7fffff) | 0x800000, 126 - (magnitude >> 23));
  }
  return {static_cast<uint16_t>(sign | result)};
}
constexpr __half __float2half(float value) { return __float2half_rn(value); }

constexpr __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
constexpr __nv_bfloat162 __float22bfloat162_rn(float2 pair) { return __floats2bfloat162_rn(pair.x, pair.y); }
constexpr float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}
constexpr float __low2float(__nv_bfloat162 pair) { return __bfloat162float(pair.x); }
constexpr float __high2float(__nv_bfloat162 pair) { return __bfloat162float(pair.y); }

constexpr __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
constexpr __half2 __float22half2_rn(float2 pair) { return __floats2half2_rn(pair.x, pair.y); }
constexpr float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
constexpr float __low2float(__half2 pair) { return __half2float(pair.x); }
constexpr float __high2float(__half2 pair) { return __half2float(pair.y); }

namespace monosoftmax::cuda::host {

// Maps the bits of a half precision number to an integer in the same order, with -0 before +0.
constexpr int ordered(uint16_t bits) { return bits & 0x8000 ? ~(bits & 0x7fff) : bits; }

// The larger of two numbers, as bits. Magnitudes above `infinity` are NaN. A NaN is passed on if pass_nan; otherwise
// the other number is the result.
template <uint16_t infinity, bool pass_nan>
constexpr uint16_t larger(uint16_t a, uint16_t b) {
  const bool a_nan = (a & 0x7fff) > infinity;
  const bool b_nan = (b & 0x7fff) > infinity;
  if ((a_nan && b_nan) || (pass_nan && (a_nan || b_nan))) return kHalfNaN;
  if (a_nan) return b;
  if (b_nan) return a;
  return ordered(a) > ordered(b) ? a : b;
}

}  // namespace monosoftmax::cuda::host

constexpr __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) {
  return {monosoftmax::cuda::host::larger<0x7f80, false>(a.bits, b.bits)};
}
constexpr __nv_bfloat16 __hmax_nan(__nv_bfloat16 a, __nv_bfloat16 b) {
  return {monosoftmax::cuda::host::larger<0x7f80, true>(a.bits, b.bits)};
}
constexpr __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
constexpr __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)};
}

constexpr __half __hmax(__half a, __half b) { return {monosoftmax::cuda::host::larger<0x7c00, false>(a.bits, b.bits)}; }
constexpr __half __hmax_nan(__half a, __half b) {
  return {monosoftmax::cuda::host::larger<0x7c00, true>(a.bits, b.bits)};
}
constexpr __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
constexpr __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
