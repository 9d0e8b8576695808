// The operations of the transforms, so that one formula serves a float, a double, a SIMD vector
// (csrc/cpu/vectorized.h) and floats on a GPU (csrc/cuda/arithmetic.cuh). Arithmetic<T> must have the members of
// Arithmetic<float>. The transforms also use + - * / on T, and T(scalar) as a broadcast.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

// Always inlined on the host. Otherwise the linker could keep one copy of a function for all instruction sets, and this
// copy could be compiled for the widest one.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define MONOSOFTMAX_HD __host__ __device__ inline
#define MONOSOFTMAX_UNROLL_2 _Pragma("unroll 2")
#else
#define MONOSOFTMAX_HD __attribute__((always_inline)) inline
#define MONOSOFTMAX_UNROLL_2 _Pragma("GCC unroll 2")
#endif

namespace monosoftmax {

template <class T>
struct Arithmetic;

// A table of coefficients lies in memory as [pieces][stride]. The coefficients of a piece lie next to each other,
// followed by the numbers that the transform derives from them.
constexpr int table_stride(int rows) {
  int stride = 1;
  while (stride < rows) stride *= 2;
  return stride;
}

// For an arithmetic without a type for the number of a piece: the number is a T, whole and >= 0.
template <class T>
struct PieceIsNumber {
  using Piece = T;
  static MONOSOFTMAX_HD Piece piece(T number) { return number; }
  static MONOSOFTMAX_HD T number(Piece piece) { return piece; }
};

template <class S, int kRows>
class ScalarTable {
 public:
  struct Row {
    S of[kRows];
  };

  MONOSOFTMAX_HD ScalarTable(const S* data, int64_t) : data_(data) {}
  MONOSOFTMAX_HD S at(int row, S piece) const { return data_[static_cast<int64_t>(piece) * table_stride(kRows) + row]; }
  MONOSOFTMAX_HD Row row(S piece) const {
    Row result;
    for (int r = 0; r < kRows; ++r) result.of[r] = at(r, piece);
    return result;
  }

 private:
  const S* data_;
};

template <class S>
struct ScalarArithmetic : PieceIsNumber<S> {
  using Scalar = S;
  using Mask = bool;
  // kSmall: the table has at most small_table(rows) pieces.
  template <int kRows, bool kSmall>
  using Table = ScalarTable<S, kRows>;
  static constexpr int64_t small_table(int) { return 0; }
  // Whether the point of a transform keeps the numbers for its gradients. On a GPU the gradients compute them again,
  // since registers cannot hold a point of variable length.
  static constexpr bool kPointsKeep = true;

  // For x <= 88.
  static MONOSOFTMAX_HD S exp(S x) { return std::exp(x); }
  // exp(-|x|)
  static MONOSOFTMAX_HD S decay(S x) { return std::exp(S(0) - std::fabs(x)); }
  // log(1 + x) for 0 <= x <= 1.
  static MONOSOFTMAX_HD S log1p(S x) { return std::log1p(x); }
  // tanh(x), and its derivative.
  static MONOSOFTMAX_HD S tanh(S x, S& slope) {
    const S result = std::tanh(x);
    slope = (S(1) - result) * (S(1) + result);
    return result;
  }
  static MONOSOFTMAX_HD S abs(S x) { return std::fabs(x); }
  static MONOSOFTMAX_HD S floor(S x) { return std::floor(x); }
  static MONOSOFTMAX_HD S fma(S a, S b, S c) { return std::fma(a, b, c); }
  static MONOSOFTMAX_HD Mask less(S a, S b) { return a < b; }
  static MONOSOFTMAX_HD Mask less_equal(S a, S b) { return a <= b; }
  // mask ? a : b
  static MONOSOFTMAX_HD S select(Mask mask, S a, S b) { return mask ? a : b; }
};

template <>
struct Arithmetic<float> : ScalarArithmetic<float> {};
template <>
struct Arithmetic<double> : ScalarArithmetic<double> {};

// An uninitialized array of T: its construction writes nothing, not even zeros.
template <class T, int size>
class Scratch {
 public:
  MONOSOFTMAX_HD T& operator[](int64_t i) { return reinterpret_cast<T*>(bytes_)[i]; }
  MONOSOFTMAX_HD const T& operator[](int64_t i) const { return reinterpret_cast<const T*>(bytes_)[i]; }

 private:
  static_assert(std::is_trivially_destructible_v<T>, "nothing is destroyed");
  alignas(T) unsigned char bytes_[size * sizeof(T)];
};

// x clamped to [lo, hi]. NaN stays NaN.
template <class T>
MONOSOFTMAX_HD T clamp(T x, T lo, T hi) {
  using A = Arithmetic<T>;
  return A::select(A::less(x, lo), lo, A::select(A::less(hi, x), hi, x));
}

// x clamped to [0, hi]. NaN becomes 0, so that the result is always a valid index.
template <class T>
struct ClampIndex {
  static MONOSOFTMAX_HD T of(T x, T hi) {
    using A = Arithmetic<T>;
    const T from_zero = A::select(A::less(T(0), x), x, T(0));
    return A::select(A::less(hi, from_zero), hi, from_zero);
  }
};

// The entries of a table if look-ups are clamped to a power of two. Entries beyond `count` repeat the last one.
constexpr int64_t padded_entries(int64_t count) {
  int64_t power = 1;
  while (power < count) power *= 2;
  return power + 1;
}

// Finds the piece that contains an offset. The first of `count` pieces begins at 0, and each has the width
// 1 / inverse_width. An offset beyond them belongs to the first or the last piece.
template <class T, bool kSmall>
class UniformPieces {
 public:
  using A = Arithmetic<T>;
  using S = typename A::Scalar;

  MONOSOFTMAX_HD UniformPieces(S inverse_width, int64_t count)
      : inverse_width_(inverse_width), last_(static_cast<S>(count - 1)) {}
  MONOSOFTMAX_HD typename A::Piece operator()(T offset) const {
    return A::piece(ClampIndex<T>::of(A::floor(offset * inverse_width_), last_));
  }
  // The entries of a table of `count` pieces.
  static constexpr int64_t entries(int64_t count) { return count; }

 private:
  T inverse_width_, last_;
};

// Counts, by bisection, how many of the increasing at(0) .. at(count - 1) are <= x; 0 for NaN.
template <class T>
class CountLessEqual {
 public:
  using A = Arithmetic<T>;
  using S = typename A::Scalar;

  explicit MONOSOFTMAX_HD CountLessEqual(int64_t count) : count_(static_cast<S>(count)), first_step_(count > 0) {
    while (0 < first_step_ && 2 * first_step_ <= count_) first_step_ *= 2;
  }
  template <class At>
  MONOSOFTMAX_HD T operator()(T x, At&& at) const {
    const T last(count_);
    T found(0);
    for (S step = first_step_; step >= 1; step /= 2) {
      const T next = found + T(step);
      const auto beyond = A::less(last, next);
      const T probe = at(A::select(beyond, last, next) - T(1));
      const T advanced = A::select(A::less_equal(probe, x), next, found);
      found = A::select(beyond, found, advanced);
    }
    return found;
  }

 private:
  S count_, first_step_;
};

// exp(-|u|), and from it two sigmoids and the softplus, without overflow or cancellation.
template <class T>
struct Logistic {
  T sigmoid;             // sigmoid(u)
  T sigmoid_complement;  // sigmoid(-u)
  T decay;               // exp(-|u|)

  explicit MONOSOFTMAX_HD Logistic(T u) {
    using A = Arithmetic<T>;
    decay = A::decay(u);
    const T large = T(1) / (T(1) + decay);
    const T small = decay * large;
    const auto negative = A::less(u, T(0));
    sigmoid = A::select(negative, small, large);
    sigmoid_complement = A::select(negative, large, small);
  }
};

// tanh(u) to absolute accuracy, cheaper than the tanh of Arithmetic, and its derivative to relative accuracy.
template <class T>
struct HyperbolicTangent {
  T tanh, slope;

  explicit MONOSOFTMAX_HD HyperbolicTangent(T u) {
    using A = Arithmetic<T>;
    const T decay = A::exp(T(-2) * A::abs(u));
    const T complement = (decay + decay) / (T(1) + decay);  // 1 - |tanh(u)|
    const T size = T(1) - complement;
    tanh = A::select(A::less(u, T(0)), T(0) - size, size);
    slope = complement * (T(1) + size);
  }
};

// A kernel's arguments for a transform: a vector [size], or a table of size pieces.
template <class S>
struct Coefficients {
  const S* data;
  int64_t size;
  const double* constants;
};

}  // namespace monosoftmax
