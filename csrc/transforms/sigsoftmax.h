// f(z) = z + log sigmoid(z).
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class SigSoftmax {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;

  struct Point {
    T value, derivative;
  };

  explicit MONOSOFTMAX_HD SigSoftmax(const Coefficients<S>&) {}

  MONOSOFTMAX_HD T value(T z) const { return from(z, A::decay(z)); }
  MONOSOFTMAX_HD Point at(T z) const {
    const Logistic<T> logistic(z);
    return {from(z, logistic.decay), T(1) + logistic.sigmoid_complement};
  }
  MONOSOFTMAX_HD void accumulate(const Point&, T, T, T*) const {}

 private:
  using A = Arithmetic<T>;

  static MONOSOFTMAX_HD T from(T z, T decay) { return z + (A::select(A::less(z, T(0)), z, T(0)) - A::log1p(decay)); }
};

}  // namespace monosoftmax
