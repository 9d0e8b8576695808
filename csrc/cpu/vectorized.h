// Arithmetic of the transforms on torch's SIMD vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "../transforms/arithmetic.h"
#include "piece_table.h"
#include "simd_math.h"

namespace monosoftmax {

inline namespace CPU_CAPABILITY {

template <class S>
struct VectorArithmetic : PieceIsNumber<at::vec::Vectorized<S>> {
  using Scalar = S;
  using T = at::vec::Vectorized<S>;
  template <int kRows, bool kSmall>
  using Table = cpu::PieceTable<S, kRows, kSmall>;
  static constexpr int64_t small_table(int rows) { return cpu::small_table<S>(rows); }
  static constexpr bool kPointsKeep = true;

  static T abs(T x) { return x.abs(); }
  static T floor(T x) { return x.floor(); }
  static T fma(T a, T b, T c) { return at::vec::fmadd(a, b, c); }
};

}  // namespace CPU_CAPABILITY

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
// Two instructions. On x86, clamp_min gives its first argument where the second is NaN; on other processors, NaN.
template <class S>
struct ClampIndex<at::vec::Vectorized<S>> {
  using T = at::vec::Vectorized<S>;
  static MONOSOFTMAX_HD T of(T x, T hi) { return at::vec::clamp_max(at::vec::clamp_min(T(0), x), hi); }
};
#endif

template <>
struct Arithmetic<at::vec::Vectorized<double>> : VectorArithmetic<double> {
  using Mask = T;
  static T exp(T x) { return x.exp(); }
  static T decay(T x) { return exp(T(0) - abs(x)); }
  static T log1p(T x) { return x.log1p(); }
  static T tanh(T x, T& slope) {
    const T result = x.tanh();
    slope = (T(1) - result) * (T(1) + result);
    return result;
  }
  static Mask less(T a, T b) { return a < b; }
  static Mask less_equal(T a, T b) { return a <= b; }
  static T select(Mask mask, T a, T b) { return T::blendv(b, a, mask); }
};

template <>
struct Arithmetic<at::vec::Vectorized<float>> : VectorArithmetic<float> {
  using Mask = cpu::FloatMask;
  static T exp(T x) { return cpu::simd_exp(x); }
  static T decay(T x) { return exp(T(0) - abs(x)); }
  static T log1p(T x) { return cpu::simd_log1p(x); }
  static T tanh(T x, T& slope) { return cpu::simd_tanh(x, slope); }
  static Mask less(T a, T b) { return cpu::less(a, b); }
  static Mask less_equal(T a, T b) { return cpu::less_equal(a, b); }
  static T select(Mask mask, T a, T b) { return cpu::select(mask, a, b); }
};

}  // namespace monosoftmax
