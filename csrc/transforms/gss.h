// f(z) = k (z-c) + c - (k-1) softplus(z-c). Coefficients: k, c.
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class Gss {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;

  struct Point {
    T value, derivative;
    T by_k, by_c;
  };

  explicit MONOSOFTMAX_HD Gss(const Coefficients<S>& c) : k_(c.data[0]), c_(c.data[1]), excess_(c.data[0] - 1) {}

  MONOSOFTMAX_HD T value(T z) const {
    const T u = z - c_;
    return from(u, A::log1p(A::decay(u)));
  }
  MONOSOFTMAX_HD Point at(T z) const {
    const T u = z - c_;
    const Logistic<T> logistic(u);
    const T log_term = A::log1p(logistic.decay);
    const T by_k = A::select(A::less(u, T(0)), u, T(0)) - log_term;
    return {from(u, log_term), logistic.sigmoid + k_ * logistic.sigmoid_complement, by_k,
            T(0) - excess_ * logistic.sigmoid_complement};
  }
  MONOSOFTMAX_HD void accumulate(const Point& at, T, T gradient, T* sums) const {
    sums[0] = A::fma(gradient, at.by_k, sums[0]);
    sums[1] = A::fma(gradient, at.by_c, sums[1]);
  }

 private:
  using A = Arithmetic<T>;

  // The linear part of softplus is subtracted by hand, so that no end computes inf - inf.
  MONOSOFTMAX_HD T from(T u, T log_term) const {
    return c_ + A::select(A::less(u, T(0)), k_ * u, u) - excess_ * log_term;
  }

  T k_, c_, excess_;
};

}  // namespace monosoftmax
