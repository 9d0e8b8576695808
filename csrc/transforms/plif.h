// Piecewise linear: f(z) = value_k + slope_k (z - knot_k), k = clamp(floor((z - lo) / width), 0, K - 1).
// Coefficients: slope and value of each of K pieces. Constants: lo, width, 1 / width.
//
// A look-up gives the line of a piece, slope_k and value_k - slope_k knot_k, so that a value takes one fma. The
// operations that find a piece are exactly the operations of the reference: so both put a logit next to a knot on the
// same side.
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T, bool kSmall>
class Plif {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 2;
  static constexpr bool kUniformPieces = true;
  // Replaces the value of piece k by value_k - slope_k knot_k.
  static MONOSOFTMAX_HD void derive(S* piece, int64_t k, const double* constants) {
    const S knot = static_cast<S>(constants[0]) + static_cast<S>(k) * static_cast<S>(constants[1]);
    piece[1] = Arithmetic<S>::fma(S(0) - piece[0], knot, piece[1]);
  }
  static constexpr int64_t entries(int64_t pieces) { return UniformPieces<T, kSmall>::entries(pieces); }

  struct Point {
    T value, derivative;
    typename Arithmetic<T>::Piece piece;
    T offset;
  };

  explicit MONOSOFTMAX_HD Plif(const Coefficients<S>& c)
      : table_(c.data, c.size),
        pieces_(static_cast<S>(c.constants[2]), c.size),
        lo_(static_cast<S>(c.constants[0])),
        width_(static_cast<S>(c.constants[1])) {}

  MONOSOFTMAX_HD T value(T z) const { return at(z).value; }
  MONOSOFTMAX_HD Point at(T z) const {
    const auto piece = pieces_(z - lo_);
    const auto [slope, intercept] = table_.row(piece).of;
    return {A::fma(slope, z, intercept), slope, piece, z - A::fma(A::number(piece), width_, lo_)};
  }
  // df/d(slope, value) of the piece.
  MONOSOFTMAX_HD void differentiate(const Point& at, T, T (&out)[kTableRows]) const {
    out[0] = at.offset;
    out[1] = T(1);
  }

 private:
  using A = Arithmetic<T>;

  typename A::template Table<kTableRows, kSmall> table_;
  UniformPieces<T, kSmall> pieces_;
  T lo_, width_;
};

}  // namespace monosoftmax
