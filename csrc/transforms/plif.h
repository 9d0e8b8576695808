// Piecewise linear: f(z) = value_k + slope_k (z - knot_k), k = clamp(floor((z - lo) / width), 0, K - 1).
// Coefficients: slope and value of each of K pieces. Constants: lo, width, 1 / width.
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T, bool kSmall>
class Plif {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 2;
  static void derive(S*) {}

  struct Point {
    T value, derivative;
    T piece, offset;
  };

  explicit MONOSOFTMAX_HD Plif(const Coefficients<S>& c)
      : table_(c.data, c.size),
        last_(static_cast<S>(c.size - 1)),
        lo_(static_cast<S>(c.constants[0])),
        width_(static_cast<S>(c.constants[1])),
        inverse_width_(static_cast<S>(c.constants[2])) {}

  MONOSOFTMAX_HD T value(T z) const { return at(z).value; }
  MONOSOFTMAX_HD Point at(T z) const {
    const T k = piece(z);
    const auto [slope, value] = table_.row(k).of;
    const T offset = z - knot(k);
    return {A::fma(slope, offset, value), slope, k, offset};
  }
  // gradient * df/d(slope, value) of the piece
  MONOSOFTMAX_HD void contribute(const Point& at, T, T gradient, T (&out)[kTableRows]) const {
    out[0] = gradient * at.offset;
    out[1] = gradient;
  }

 private:
  using A = Arithmetic<T>;

  // In these very operations the reference computes them too: both see a logit next to a knot on the same side.
  MONOSOFTMAX_HD T piece(T z) const { return clamp_index(A::floor((z - lo_) * inverse_width_), last_); }
  MONOSOFTMAX_HD T knot(T k) const { return lo_ + k * width_; }

  typename A::template Table<kTableRows, kSmall> table_;
  T last_, lo_, width_, inverse_width_;
};

}  // namespace monosoftmax
