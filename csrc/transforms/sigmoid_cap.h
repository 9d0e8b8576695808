// f(z) = a sigmoid((z + b) / c). Coefficients: a, b, c.
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class SigmoidCap {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;

  struct Point {
    T value, derivative;
    T scaled, sigmoid;
  };

  explicit MONOSOFTMAX_HD SigmoidCap(const Coefficients<S>& c)
      : a_(c.data[0]), b_(c.data[1]), c_(c.data[2]), ratio_(c.data[0] / c.data[2]) {}

  MONOSOFTMAX_HD T value(T z) const { return a_ * Logistic<T>((z + b_) / c_).sigmoid; }
  MONOSOFTMAX_HD Point at(T z) const {
    // The sigmoid is constant beyond 400. The clamp avoids inf * 0 in the gradient of c.
    const T u = clamp((z + b_) / c_, T(-400), T(400));
    const Logistic<T> logistic(u);
    return {a_ * logistic.sigmoid, ratio_ * (logistic.sigmoid * logistic.sigmoid_complement), u, logistic.sigmoid};
  }
  MONOSOFTMAX_HD void accumulate(const Point& at, T, T gradient, T* sums) const {
    const T by_b = gradient * at.derivative;
    sums[0] = Arithmetic<T>::fma(gradient, at.sigmoid, sums[0]);
    sums[1] = sums[1] + by_b;
    sums[2] = sums[2] - by_b * at.scaled;
  }

 private:
  T a_, b_, c_, ratio_;
};

}  // namespace monosoftmax
