// Monotonic rational quadratic spline, linear beyond its ends.
// Coefficients: table [6, K] of x, width, y, height, d0, d1 of each piece. With s = height / width, xi = (z - x) /
// width, D = s (xi^2 + (1-xi)^2) + (d0 + d1) xi (1-xi):
//   f  = y + height (s xi^2 + d0 xi (1-xi)) / D
//   f' = s^2 (d1 xi^2 + 2 s xi (1-xi) + d0 (1-xi)^2) / D^2
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class Spline {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 6;

  struct Point {
    T value, derivative;
    T piece;
    T xi, below, above;  // place within the piece, and distance beyond its left (<= 0) and right (>= 0) end
  };

  explicit MONOSOFTMAX_HD Spline(const Coefficients<S>& c) : table_(c.data), pieces_(c.size) {}

  MONOSOFTMAX_HD T value(T z) const { return at(z).value; }
  MONOSOFTMAX_HD Point at(T z) const {
    const T k = count_less_equal(table_ + 1, pieces_ - 1, z);
    const Piece p(*this, k);
    const T offset = z - p.x;
    const auto is_below = A::less(offset, T(0));
    const auto is_above = A::less(p.width, offset);
    const T inside = A::select(is_below, T(0), A::select(is_above, p.width, offset));
    const T below = A::select(is_below, offset, T(0));
    const T above = A::select(is_above, offset - p.width, T(0));
    const T xi = inside / p.width;
    const Ratio r(p, xi);
    const T steep = p.slope / r.denominator;
    const T tails = A::fma(p.d0, below, p.d1 * above);
    return {p.y + p.height * (r.numerator / r.denominator) + tails,
            steep * steep * (p.d1 * xi * xi + T(2) * p.slope * r.bump + p.d0 * (T(1) - xi) * (T(1) - xi)),
            k,
            xi,
            below,
            above};
  }
  // gradient * df/d(x, width, y, height, d0, d1) of the piece
  MONOSOFTMAX_HD void contribute(const Point& at, T, T gradient, T (&out)[kTableRows]) const {
    const Piece p(*this, at.piece);
    const T xi = at.xi;
    const Ratio r(p, xi);
    const T scaled = p.height / (r.denominator * r.denominator);
    // With N the numerator: d(N/D)/ds = (xi^2 D - N (xi^2 + (1-xi)^2)) / D^2, whose parts in s cancel exactly.
    const T by_slope = scaled * r.bump * (p.d1 * xi * xi - p.d0 * (T(1) - xi) * (T(1) - xi));
    const T by_d0 = scaled * r.bump * (r.denominator - r.numerator);
    const T by_d1 = T(0) - scaled * r.bump * r.numerator;
    const auto outside = A::less(T(0), at.above - at.below);
    const auto is_above = A::less(T(0), at.above);
    // x and width move the piece under a fixed z: xi falls by 1 / width and xi / width, where z is inside.
    const T by_x = T(0) - at.derivative;
    const T by_width_inside = T(0) - at.derivative * xi - by_slope * p.slope / p.width;
    const T by_width_outside = A::select(is_above, T(0) - p.d1, T(0));
    out[0] = gradient * by_x;
    out[1] = gradient * A::select(outside, by_width_outside, by_width_inside);
    out[2] = gradient;
    out[3] = gradient * (r.numerator / r.denominator + by_slope / p.width);
    out[4] = gradient * (by_d0 + at.below);
    out[5] = gradient * (by_d1 + at.above);
  }

 private:
  using A = Arithmetic<T>;

  struct Piece {
    T x, width, y, height, d0, d1, slope;

    MONOSOFTMAX_HD Piece(const Spline& spline, T k)
        : x(spline.row(0, k)),
          width(spline.row(1, k)),
          y(spline.row(2, k)),
          height(spline.row(3, k)),
          d0(spline.row(4, k)),
          d1(spline.row(5, k)),
          slope(height / width) {}
  };

  struct Ratio {
    T bump, numerator, denominator;

    MONOSOFTMAX_HD Ratio(const Piece& p, T xi)
        : bump(xi * (T(1) - xi)),
          numerator(p.slope * xi * xi + p.d0 * bump),
          denominator(p.slope * (xi * xi + (T(1) - xi) * (T(1) - xi)) + (p.d0 + p.d1) * bump) {}
  };

  MONOSOFTMAX_HD T row(int r, T k) const { return A::gather(table_ + r * pieces_, k); }

  const S* table_;
  int64_t pieces_;
};

}  // namespace monosoftmax
