// f(z) = w0 z + sum_h a_h tanh(b_h z + c_h). Coefficients: w0, a[H], b[H], c[H].
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class MonotonicMlp {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;

  struct Point {
    T value, derivative;
  };

  explicit MONOSOFTMAX_HD MonotonicMlp(const Coefficients<S>& c)
      : linear_(c.data),
        amplitude_(c.data + 1),
        units_((c.size - 1) / 3),
        steepness_(amplitude_ + units_),
        shift_(steepness_ + units_) {}

  MONOSOFTMAX_HD T value(T z) const {
    T result = T(*linear_) * z;
    for (int64_t h = 0; h < units_; ++h) {
      result = A::fma(T(amplitude_[h]), A::tanh(argument(h, z)), result);
    }
    return result;
  }
  MONOSOFTMAX_HD Point at(T z) const {
    Point point{T(*linear_) * z, T(*linear_)};
    for (int64_t h = 0; h < units_; ++h) {
      const T t = A::tanh(argument(h, z));
      point.value = A::fma(T(amplitude_[h]), t, point.value);
      point.derivative = A::fma(T(amplitude_[h] * steepness_[h]), slope(t), point.derivative);
    }
    return point;
  }
  // Evaluates the units again: keeping H of them costs more registers than there are.
  MONOSOFTMAX_HD void accumulate(const Point&, T z, T gradient, T* sums) const {
    sums[0] = A::fma(gradient, z, sums[0]);
    for (int64_t h = 0; h < units_; ++h) {
      const T t = A::tanh(argument(h, z));
      const T by_shift = gradient * T(amplitude_[h]) * slope(t);
      sums[1 + h] = A::fma(gradient, t, sums[1 + h]);
      sums[1 + units_ + h] = A::fma(by_shift, z, sums[1 + units_ + h]);
      sums[1 + 2 * units_ + h] = sums[1 + 2 * units_ + h] + by_shift;
    }
  }

 private:
  using A = Arithmetic<T>;

  MONOSOFTMAX_HD T argument(int64_t h, T z) const { return A::fma(T(steepness_[h]), z, T(shift_[h])); }
  static MONOSOFTMAX_HD T slope(T tanh) { return (T(1) - tanh) * (T(1) + tanh); }

  const S* linear_;
  const S* amplitude_;
  int64_t units_;
  const S* steepness_;
  const S* shift_;
};

}  // namespace monosoftmax
