// f(z) = z.
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class Identity {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;

  struct Point {
    T value, derivative;
  };

  explicit MONOSOFTMAX_HD Identity(const Coefficients<S>&) {}

  MONOSOFTMAX_HD T value(T z) const { return z; }
  MONOSOFTMAX_HD Point at(T z) const { return {z, T(1)}; }
  MONOSOFTMAX_HD void accumulate(const Point&, T, T, T*) const {}
};

}  // namespace monosoftmax
