// The arithmetic of the host build: conversions, maxima and rounding against slow and exact models of them.
#include <algorithm>
#include <cfenv>
#include <cstring>
#include <limits>
#include <vector>

#include "../check.h"
#include "cuda/platform.h"

namespace monosoftmax::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
constexpr float kSmallestNormal = std::numeric_limits<float>::min();
constexpr float kLargest = std::numeric_limits<float>::max();

bool same(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

uint64_t random_state = 1;
uint32_t random_bits() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(random_state >> 32);
}

// A format of 16 bits: 1 for the sign, some for the exponent, the others for the fraction.
struct Format {
  int exponent_bits;

  int fraction_bits() const { return 15 - exponent_bits; }
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits) - 1) << fraction_bits()); }

  // Of bits without the sign. What would be infinity has the value that rounding takes it for: the next power of two.
  double value(uint16_t bits) const {
    const int exponent = bits >> fraction_bits();
    const int fraction = bits & ((1 << fraction_bits()) - 1);
    if (exponent == 0) return std::ldexp(fraction, 1 - bias() - fraction_bits());
    return std::ldexp(fraction + (1 << fraction_bits()), exponent - bias() - fraction_bits());
  }
  // The nearest of all values, and of two the even one.
  uint16_t nearest(float x) const {
    if (std::isnan(x)) return 0x7fff;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double size = std::fabs(static_cast<double>(x));
    // The last one that is not larger.
    uint16_t low = 0, high = infinity();
    while (high - low > 1) {
      const auto middle = static_cast<uint16_t>((low + high) / 2);
      (value(middle) <= size ? low : high) = middle;
    }
    if (size >= value(infinity())) return sign | infinity();
    const double below = size - value(low), above = value(high) - size;
    return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
  }
};
constexpr Format kBFloat16{8}, kHalf{5};

uint16_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
uint16_t bits_of(__half x) { return __half_as_ushort(x); }

// Around every number of the format, halfway to the next one, next to that, and anywhere.
std::vector<float> floats_for(const Format& format) {
  std::vector<float> numbers = {0, kSmallest, kSmallestNormal, kLargest, kInfinity, kNaN};
  for (uint16_t bits = 0; bits < format.infinity(); ++bits) {
    const auto here = static_cast<float>(format.value(bits));
    const auto middle = static_cast<float>((format.value(bits) + format.value(bits + 1)) / 2);
    for (const float x : {here, middle}) {
      numbers.insert(numbers.end(), {x, std::nextafter(x, 0.0f), std::nextafter(x, kInfinity)});
    }
  }
  for (int i = 0; i < 100000; ++i) numbers.push_back(std::bit_cast<float>(random_bits()));
  return numbers;
}

template <class Narrow, class Widen, class FromBits>
void test_format(const Format& format, Narrow narrow, Widen widen, FromBits from_bits) {
  int wrong = 0;
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto half = from_bits(static_cast<unsigned short>(bits));
    const float x = widen(half);
    const auto size = static_cast<uint16_t>(bits & 0x7fff);
    const uint16_t back = bits_of(narrow(x));
    if (size > format.infinity()) {
      wrong += !std::isnan(x) || back != 0x7fff;
    } else {
      const double value = size == format.infinity() ? kInfinity : format.value(size);
      wrong += !same(x, static_cast<float>(bits & 0x8000 ? -value : value)) || back != bits;
    }
  }
  CHECK(wrong == 0);
  for (const float x : floats_for(format)) {
    wrong += bits_of(narrow(x)) != format.nearest(x) || bits_of(narrow(-x)) != format.nearest(-x);
  }
  CHECK(wrong == 0);
}

void test_conversions() {
  test_format(kBFloat16, __float2bfloat16_rn, __bfloat162float, __ushort_as_bfloat16);
  test_format(kHalf, __float2half_rn, __half2float, __ushort_as_half);
  static_assert(sizeof(__half2) == 4 && sizeof(__nv_bfloat162) == 4 && sizeof(__half) == 2);

  const __nv_bfloat162 b = __floats2bfloat162_rn(1.5f, -2.0f);
  CHECK(bits_of(b.x) == 0x3fc0 && bits_of(b.y) == 0xc000);
  CHECK(__low2float(b) == 1.5f && __high2float(b) == -2.0f);
  CHECK(__bfloat1622float2(b).x == 1.5f && __bfloat1622float2(b).y == -2.0f);
  CHECK(bits_of(__float22bfloat162_rn(make_float2(3, 4)).y) == bits_of(__float2bfloat16_rn(4)));
  const __half2 h = __floats2half2_rn(1.5f, -2.0f);
  CHECK(bits_of(h.x) == 0x3e00 && bits_of(h.y) == 0xc000);
  CHECK(__low2float(h) == 1.5f && __high2float(h) == -2.0f);
  CHECK(__half22float2(h).x == 1.5f && __half22float2(h).y == -2.0f);
  CHECK(bits_of(__float22half2_rn(make_float2(3, 4)).y) == bits_of(__float2half_rn(4)));
}

template <class Half, class FromBits, class Widen>
void test_maximum(FromBits from_bits, Widen widen) {
  int wrong = 0;
  for (int i = 0; i < 200000; ++i) {
    const auto pick = [&] {
      return from_bits(static_cast<unsigned short>(i % 3 == 0 ? random_bits() & 0x8003 : random_bits()));
    };
    const Half a = pick(), b = pick();
    const float x = widen(a), y = widen(b);
    const bool swap = std::isnan(x) || x < y || (x == 0 && y == 0 && std::signbit(x));
    const uint16_t number = std::isnan(x) && std::isnan(y) ? 0x7fff : bits_of(swap ? b : a);
    const uint16_t with_nan = std::isnan(x) || std::isnan(y) ? 0x7fff : number;
    // max(number, NaN) is the number.
    const uint16_t larger = std::isnan(y) && !std::isnan(x) ? bits_of(a) : number;
    wrong += bits_of(__hmax(a, b)) != larger || bits_of(__hmax_nan(a, b)) != with_nan;
  }
  CHECK(wrong == 0);
}

void test_maxima() {
  test_maximum<__nv_bfloat16>(__ushort_as_bfloat16, __bfloat162float);
  test_maximum<__half>(__ushort_as_half, __half2float);
  const __half2 h = __hmax2(__floats2half2_rn(1, kNaN), __floats2half2_rn(2, 3));
  CHECK(__low2float(h) == 2 && __high2float(h) == 3);
  const __half2 h_nan = __hmax2_nan(__floats2half2_rn(1, kNaN), __floats2half2_rn(2, 3));
  CHECK(__low2float(h_nan) == 2 && std::isnan(__high2float(h_nan)));
  const __nv_bfloat162 b = __hmax2(__floats2bfloat162_rn(1, kNaN), __floats2bfloat162_rn(2, 3));
  CHECK(__low2float(b) == 2 && __high2float(b) == 3);
  const __nv_bfloat162 b_nan = __hmax2_nan(__floats2bfloat162_rn(1, kNaN), __floats2bfloat162_rn(2, 3));
  CHECK(__low2float(b_nan) == 2 && std::isnan(__high2float(b_nan)));
}

// A binary number of any length, as a sum of terms m 2^e: exact, and slow.
class Exact {
 public:
  void add(int64_t m, int exponent) {
    constexpr int kBase = 320;  // the products of the smallest floats are multiples of 2^-298
    uint64_t size = m < 0 ? -static_cast<uint64_t>(m) : static_cast<uint64_t>(m);
    for (int bit = exponent + kBase; size != 0; size >>= 1, ++bit) {
      if (size & 1) add_bit(static_cast<size_t>(bit), m < 0);
    }
  }
  int sign() const {
    if (digits_.back() & 0x80000000) return -1;
    return std::any_of(digits_.begin(), digits_.end(), [](uint32_t digit) { return digit != 0; });
  }

 private:
  // Two's complement.
  void add_bit(size_t bit, bool subtract) {
    uint64_t amount = uint64_t{1} << bit % 32;
    for (size_t i = bit / 32; i < digits_.size() && amount != 0; ++i) {
      const uint64_t digit = subtract ? digits_[i] - amount : digits_[i] + amount;
      digits_[i] = static_cast<uint32_t>(digit);
      amount = digit >> 32 != 0 ? 1 : 0;
    }
  }
  std::vector<uint32_t> digits_ = std::vector<uint32_t>(24);
};

struct Parts {
  int64_t m;
  int exponent;
};
Parts parts_of(float x) {
  int exponent = 0;
  const double fraction = std::frexp(static_cast<double>(x), &exponent);
  return {static_cast<int64_t>(std::ldexp(fraction, 24)), exponent - 24};
}

// The sign of a b + c - x.
int compare(float a, float b, float c, float x) {
  Exact sum;
  const Parts pa = parts_of(a), pb = parts_of(b), pc = parts_of(c), px = parts_of(x);
  sum.add(pa.m * pb.m, pa.exponent + pb.exponent);
  sum.add(pc.m, pc.exponent);
  sum.add(-px.m, px.exponent);
  return sum.sign();
}

// Whether x is the largest float up to a b + c.
bool is_rounded_down(float a, float b, float c, float x) {
  if (std::isnan(x)) return false;
  if (x == -kInfinity) return compare(a, b, c, -kLargest) < 0;
  if (x == kInfinity || compare(a, b, c, x) < 0) return false;
  return x == kLargest || compare(a, b, c, std::nextafter(x, kInfinity)) < 0;
}

float some_float(int near) {
  const uint32_t bits = random_bits();
  switch (near) {
    case 0: return std::bit_cast<float>(bits);  // of any size
    case 1: return std::bit_cast<float>((bits & 0x807fffff) | (120 + random_bits() % 16) << 23);
    case 2: return std::bit_cast<float>(bits & 0x807fffff);  // subnormal
    default: return std::bit_cast<float>((bits & 0x80000003) | 127 << 23);
  }
}

void test_rounding_down() {
  int wrong = 0;
  for (int i = 0; i < 100000; ++i) {
    const float a = some_float(i % 4), b = some_float(i / 4 % 4);
    float c = some_float(i / 16 % 4);
    if (i % 5 == 0) c = -a * b;  // what is left is the rounding of that
    if (!std::isfinite(a) || !std::isfinite(b) || !std::isfinite(c)) continue;
    wrong += !is_rounded_down(a, b, c, __fmaf_rd(a, b, c));
    wrong += !is_rounded_down(a, 1, c, __fadd_rd(a, c));
  }
  CHECK(wrong == 0);

  CHECK(same(__fadd_rd(1, -1), -0.0f));
  CHECK(same(__fadd_rd(0.0f, 0.0f), 0.0f));
  CHECK(same(__fadd_rd(0.0f, -0.0f), -0.0f));
  CHECK(same(__fmaf_rd(2, 3, -6), -0.0f));
  CHECK(same(__fmaf_rd(-kSmallest, kSmallest, 0), -kSmallest));
  CHECK(same(__fmaf_rd(kSmallest, kSmallest, 0), 0.0f));
  CHECK(same(__fmaf_rd(kSmallest, kSmallest, -1), -1));
  CHECK(same(__fmaf_rd(-kSmallest, kSmallest, 1), std::nextafter(1.0f, 0.0f)));
  CHECK(same(__fmaf_rd(kLargest, 2, 0), kLargest));
  CHECK(same(__fmaf_rd(kLargest, -2, 0), -kInfinity));
  CHECK(same(__fadd_rd(kLargest, kSmallest), kLargest));
  CHECK(same(__fadd_rd(-kLargest, -kSmallest), -kInfinity));
  CHECK(same(__fadd_rd(kInfinity, 1), kInfinity));
  CHECK(same(__fadd_rd(kInfinity, -kInfinity), kNaN));
  CHECK(same(__fmaf_rd(kInfinity, 0, 1), kNaN));
  CHECK(same(__fmaf_rd(kInfinity, -1, 1), -kInfinity));
}

void test_single_rounding() {
  // a b + c is 1 + 2^-23 + 2^-46, and 1 + 2^-22 + 2^-46 - (1 + 2^-22).
  const float a = 1 + 0x1p-23f;
  CHECK(__fmaf_rn(a, a, 0) == 1 + 0x1p-22f);
  CHECK(__fmaf_rn(a, a, -(1 + 0x1p-22f)) == 0x1p-46f);
  CHECK(__fadd_rn(1, 0x1p-24f) == 1);
  CHECK(__fmul_rn(3, 0.5f) == 1.5f);
}

void test_clamps() {
  CHECK(same(__saturatef(kNaN), 0) && same(__saturatef(-1), 0) && same(__saturatef(-0.0f), 0));
  CHECK(__saturatef(0.25f) == 0.25f && __saturatef(1.5f) == 1 && __saturatef(kInfinity) == 1);
  CHECK(__vimax_s32_relu(-3, -2) == 0 && __vimax_s32_relu(-3, 5) == 5 && __vimax_s32_relu(7, 5) == 7);
  CHECK(__vimin_s32_relu(-3, 5) == 0 && __vimin_s32_relu(4, 5) == 4 && __vimin_s32_relu(9, 5) == 5);
  CHECK(max(2, -3) == 2 && min(2, -3) == -3 && max(1u, 0xffffffffu) == 0xffffffffu);
  CHECK(same(__fdividef(1, 0x1p127f), 0) && same(__fdividef(-1, 0x1p127f), -0.0f) && __fdividef(1, 4) == 0.25f);
  CHECK(same(__fdividef(kInfinity, 0x1p127f), kNaN) && same(__fdividef(1, kInfinity), 0));
}

void test_approximations() {
  using namespace cuda;
  CHECK(exp2_approximate(3) == 8 && exp2_approximate(-126) == kSmallestNormal);
  CHECK(same(exp2_approximate(-126.5f), 0) && same(exp2_approximate(-kInfinity), 0));
  CHECK(exp2_approximate(200) == kInfinity && std::isnan(exp2_approximate(kNaN)));
  CHECK(log2_approximate(8) == 3 && log2_approximate(kSmallest) == -kInfinity && std::isnan(log2_approximate(-1)));
  CHECK(reciprocal_approximate(4) == 0.25f && reciprocal_approximate(kSmallest) == kInfinity);
  CHECK(same(reciprocal_approximate(-0x1p127f), -0.0f) && reciprocal_approximate(0x1p126f) == kSmallestNormal);
}

void test_bits() {
  CHECK(__float_as_int(-0.0f) == std::numeric_limits<int>::min() && __int_as_float(0x3f800000) == 1);
  CHECK(__float_as_uint(1) == 0x3f800000 && __uint_as_float(0x80000000) == 0);
  CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64);
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(1) == 63);
  CHECK(__ffs(0) == 0 && __ffs(1) == 1 && __ffs(std::numeric_limits<int>::min()) == 32 && __ffsll(1ll << 40) == 41);
  CHECK(__brev(1) == 0x80000000 && __brev(0x12345678) == 0x1e6a2c48);
}

}  // namespace
}  // namespace monosoftmax::test

int main() {
  using namespace monosoftmax::test;
  test_conversions();
  test_maxima();
  test_rounding_down();
  test_single_rounding();
  test_clamps();
  test_approximations();
  test_bits();
  return failures;
}
