// A monotonic rational quadratic spline, linear beyond its ends.
// Coefficients: x, width, y, height, d0, d1 of each of K pieces. With s = height / width, xi = (z - x) / width,
// D = s (xi^2 + (1-xi)^2) + (d0 + d1) xi (1-xi):
//   f  = y + height (s xi^2 + d0 xi (1-xi)) / D
//   f' = s^2 (d1 xi^2 + 2 s xi (1-xi) + d0 (1-xi)^2) / D^2
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T, bool kSmall>
class Spline {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 6, kDerived = 2;
  static constexpr bool kUniformPieces = false;
  // Adds s and 1 / width to the coefficients of a piece.
  static MONOSOFTMAX_HD void derive(S* piece, int64_t, const double*) {
    piece[6] = piece[3] / piece[1];
    piece[7] = 1 / piece[1];
  }

  static constexpr int64_t entries(int64_t pieces) { return pieces; }

  struct Point {
    T value, derivative;
    typename Arithmetic<T>::Piece piece;
    T xi, below, above;  // place within the piece, and distance beyond its left (<= 0) and right (>= 0) end
    T height, d0, d1, slope, inverse_width;
    T bump, inverse_denominator, ratio;  // xi (1-xi), 1 / D, and the factor of height in f
  };

  explicit MONOSOFTMAX_HD Spline(const Coefficients<S>& c) : table_(c.data, c.size), knots_below_(c.size - 1) {}

  MONOSOFTMAX_HD T value(T z) const { return at(z).value; }
  MONOSOFTMAX_HD Point at(T z) const {
    Point p;
    p.piece = A::piece(knots_below_(z, [this](T knot) { return table_.at(0, A::piece(knot + T(1))); }));
    const auto [x, width, y, height, d0, d1, slope, inverse_width] = table_.row(p.piece).of;
    const T offset = z - x;
    const auto is_below = A::less(offset, T(0));
    const auto is_above = A::less(width, offset);
    const T inside = A::select(is_below, T(0), A::select(is_above, width, offset));
    p.below = A::select(is_below, offset, T(0));
    p.above = A::select(is_above, offset - width, T(0));
    p.xi = inside * inverse_width;
    p.bump = p.xi * (T(1) - p.xi);
    // xi^2 + (1-xi)^2 is 1 - 2 xi (1-xi).
    const T denominator = slope + (d0 + d1 - T(2) * slope) * p.bump;
    p.inverse_denominator = T(1) / denominator;
    p.ratio = (slope * p.xi * p.xi + d0 * p.bump) * p.inverse_denominator;
    p.value = y + height * p.ratio + A::fma(d0, p.below, d1 * p.above);
    const T steep = slope * p.inverse_denominator;
    const T rest = T(1) - p.xi;
    p.derivative = steep * steep * (d1 * p.xi * p.xi + T(2) * slope * p.bump + d0 * rest * rest);
    p.height = height;
    p.d0 = d0;
    p.d1 = d1;
    p.slope = slope;
    p.inverse_width = inverse_width;
    return p;
  }
  // df/d(x, width, y, height, d0, d1) of the piece.
  MONOSOFTMAX_HD void differentiate(const Point& at, T, T (&out)[kTableRows]) const {
    const T xi = at.xi, rest = T(1) - at.xi;
    const T scaled = at.height * at.bump * at.inverse_denominator;
    // With N the numerator: d(N/D)/ds = (xi^2 D - N (xi^2 + (1-xi)^2)) / D^2. The parts with s cancel exactly.
    const T by_slope = scaled * at.inverse_denominator * (at.d1 * xi * xi - at.d0 * rest * rest);
    const T by_d0 = scaled * (T(1) - at.ratio);
    const T by_d1 = T(0) - scaled * at.ratio;
    const auto outside = A::less(T(0), at.above - at.below);
    const auto is_above = A::less(T(0), at.above);
    // x and width move the piece under a fixed z. If z is inside, xi falls by 1 / width and xi / width.
    const T by_width_inside = T(0) - at.derivative * xi - by_slope * at.slope * at.inverse_width;
    const T by_width_outside = A::select(is_above, T(0) - at.d1, T(0));
    out[0] = T(0) - at.derivative;
    out[1] = A::select(outside, by_width_outside, by_width_inside);
    out[2] = T(1);
    out[3] = at.ratio + by_slope * at.inverse_width;
    out[4] = by_d0 + at.below;
    out[5] = by_d1 + at.above;
  }

 private:
  using A = Arithmetic<T>;

  typename A::template Table<kTableRows + kDerived, kSmall> table_;
  CountLessEqual<T> knots_below_;  // counts the knots between pieces
};

}  // namespace monosoftmax
