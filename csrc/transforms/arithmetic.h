// The vocabulary that the transforms are written in, so that one formula serves a float, a double, a SIMD vector
// (csrc/cpu/vectorized.h) and a device float. Arithmetic<T> must offer what Arithmetic<float> offers here; beside it
// the transforms use + - * / on T, and T(scalar) as a broadcast.
#pragma once

#include <cmath>
#include <cstdint>

// Always inlined on the host: one shared copy of a function, compiled for the widest instruction set of the build,
// would be what the linker keeps for all of them.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define MONOSOFTMAX_HD __host__ __device__ inline
#else
#define MONOSOFTMAX_HD __attribute__((always_inline)) inline
#endif

namespace monosoftmax {

template <class T>
struct Arithmetic;

template <class S>
struct ScalarArithmetic {
  using Scalar = S;
  using Mask = bool;

  static MONOSOFTMAX_HD S exp(S x) { return std::exp(x); }
  static MONOSOFTMAX_HD S log1p(S x) { return std::log1p(x); }
  static MONOSOFTMAX_HD S tanh(S x) { return std::tanh(x); }
  static MONOSOFTMAX_HD S abs(S x) { return std::fabs(x); }
  static MONOSOFTMAX_HD S floor(S x) { return std::floor(x); }
  static MONOSOFTMAX_HD S fma(S a, S b, S c) { return std::fma(a, b, c); }
  static MONOSOFTMAX_HD Mask less(S a, S b) { return a < b; }
  static MONOSOFTMAX_HD Mask less_equal(S a, S b) { return a <= b; }
  // mask ? a : b
  static MONOSOFTMAX_HD S select(Mask mask, S a, S b) { return mask ? a : b; }
  // base[index], for an index that is a whole number >= 0
  static MONOSOFTMAX_HD S gather(const S* base, S index) { return base[static_cast<int64_t>(index)]; }
};

template <>
struct Arithmetic<float> : ScalarArithmetic<float> {};
template <>
struct Arithmetic<double> : ScalarArithmetic<double> {};

// x clamped to [lo, hi]. NaN stays NaN.
template <class T>
MONOSOFTMAX_HD T clamp(T x, T lo, T hi) {
  using A = Arithmetic<T>;
  return A::select(A::less(x, lo), lo, A::select(A::less(hi, x), hi, x));
}

// x clamped to [0, hi]. NaN becomes 0: the result may be used as an index.
template <class T>
MONOSOFTMAX_HD T clamp_index(T x, T hi) {
  using A = Arithmetic<T>;
  const T from_zero = A::select(A::less(T(0), x), x, T(0));
  return A::select(A::less(hi, from_zero), hi, from_zero);
}

// How many of sorted[0 .. count) are <= x, by bisection; 0 for NaN.
template <class T>
MONOSOFTMAX_HD T count_less_equal(const typename Arithmetic<T>::Scalar* sorted, int64_t count, T x) {
  using A = Arithmetic<T>;
  using S = typename A::Scalar;
  int64_t step = 1;
  while (2 * step <= count) step *= 2;
  const T last(static_cast<S>(count));
  T found(0);
  if (count == 0) return found;
  for (; step > 0; step /= 2) {
    const T next = found + T(static_cast<S>(step));
    const auto beyond = A::less(last, next);
    const T probe = A::gather(sorted, A::select(beyond, last, next) - T(1));
    const T advanced = A::select(A::less_equal(probe, x), next, found);
    found = A::select(beyond, found, advanced);
  }
  return found;
}

// exp(-|u|), and the two sigmoids and the softplus that follow from it without overflow or cancellation.
template <class T>
struct Logistic {
  T sigmoid;             // sigmoid(u)
  T sigmoid_complement;  // sigmoid(-u)
  T decay;               // exp(-|u|)

  explicit MONOSOFTMAX_HD Logistic(T u) {
    using A = Arithmetic<T>;
    decay = A::exp(T(0) - A::abs(u));
    const T large = T(1) / (T(1) + decay);
    const T small = decay / (T(1) + decay);
    const auto negative = A::less(u, T(0));
    sigmoid = A::select(negative, small, large);
    sigmoid_complement = A::select(negative, large, small);
  }
};

// The arguments of a transform as a kernel gets them: a vector [size], or a table [rows, size].
template <class S>
struct Coefficients {
  const S* data;
  int64_t size;
  const double* constants;
};

}  // namespace monosoftmax
