// f(z) = c tanh(z / c). Coefficients: c.
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class SoftCap {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;

  struct Point {
    T value, derivative;
    T scaled, tanh;
  };

  explicit MONOSOFTMAX_HD SoftCap(const Coefficients<S>& c) : cap_(c.data[0]) {}

  MONOSOFTMAX_HD T value(T z) const {
    T slope;
    return cap_ * A::tanh(z / cap_, slope);
  }
  MONOSOFTMAX_HD Point at(T z) const {
    // tanh is constant beyond 400. The clamp avoids inf * 0 in the gradient of c.
    const T u = clamp(z / cap_, T(-400), T(400));
    T slope;
    const T t = A::tanh(u, slope);
    return {cap_ * t, slope, u, t};
  }
  // df/dc = tanh(u) - u (1 - tanh(u)^2). For small u the difference cancels: it is computed by its
  // series, which begins with 2/3 u^3.
  MONOSOFTMAX_HD void accumulate(const Point& at, T, T gradient, T* sums) const {
    const T u = at.scaled, square = u * u;
    const T series = u * square * (T(S(2. / 3)) - square * (T(S(8. / 15)) - square * T(S(34. / 105))));
    const T small(S(sizeof(S) == sizeof(float) ? 1e-2 : 1e-4));
    const T by_cap = A::select(A::less(square, small), series, at.tanh - u * at.derivative);
    sums[0] = A::fma(gradient, by_cap, sums[0]);
  }

 private:
  using A = Arithmetic<T>;
  T cap_;
};

}  // namespace monosoftmax
