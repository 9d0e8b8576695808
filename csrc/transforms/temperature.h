// f(z) = z / tau. Coefficients: tau.
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class Temperature {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;

  struct Point {
    T value, derivative;
  };

  explicit MONOSOFTMAX_HD Temperature(const Coefficients<S>& c) : tau_(c.data[0]), inverse_(1 / c.data[0]) {}

  MONOSOFTMAX_HD T value(T z) const { return z / tau_; }
  MONOSOFTMAX_HD Point at(T z) const { return {z / tau_, inverse_}; }
  MONOSOFTMAX_HD void accumulate(const Point& at, T, T gradient, T* sums) const {
    sums[0] = sums[0] - gradient * (at.value * inverse_);
  }

 private:
  T tau_, inverse_;
};

}  // namespace monosoftmax
