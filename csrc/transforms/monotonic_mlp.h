// f(z) = w0 z + sum_h a_h tanh(b_h z + c_h). Coefficients: w0, a[H], b[H], c[H].
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class MonotonicMlp {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kTableRows = 0;
  static constexpr int kMostUnits = 21;  // 3 * 21 + 1 is kMostVectorCoefficients

  struct Point {
    T value, derivative;
    Scratch<T, Arithmetic<T>::kPointsKeep ? kMostUnits : 1> tanh, slope;  // of each unit, if kPointsKeep
  };

  explicit MONOSOFTMAX_HD MonotonicMlp(const Coefficients<S>& c)
      : linear_(c.data),
        amplitude_(c.data + 1),
        units_((c.size - 1) / 3),
        steepness_(amplitude_ + units_),
        shift_(steepness_ + units_) {}

  MONOSOFTMAX_HD T value(T z) const {
    T result = T(*linear_) * z;
    MONOSOFTMAX_UNROLL_2
    for (int64_t h = 0; h < units_; ++h) {
      result = A::fma(T(amplitude_[h]), HyperbolicTangent<T>(argument(h, z)).tanh, result);
    }
    return result;
  }
  MONOSOFTMAX_HD Point at(T z) const {
    Point point;
    T value = T(*linear_) * z, derivative(*linear_);
    MONOSOFTMAX_UNROLL_2
    for (int64_t h = 0; h < units_; ++h) {
      const HyperbolicTangent<T> unit(argument(h, z));
      value = A::fma(T(amplitude_[h]), unit.tanh, value);
      derivative = A::fma(T(amplitude_[h] * steepness_[h]), unit.slope, derivative);
      if constexpr (A::kPointsKeep) {
        point.tanh[h] = unit.tanh;
        point.slope[h] = unit.slope;
      }
    }
    point.value = value;
    point.derivative = derivative;
    return point;
  }
  // Sums: T*, or a type with the same indexing, reading and assignment.
  template <class Sums>
  MONOSOFTMAX_HD void accumulate(const Point& at, T z, T gradient, Sums sums) const {
    sums[0] = A::fma(gradient, z, sums[0]);
    MONOSOFTMAX_UNROLL_2
    for (int64_t h = 0; h < units_; ++h) {
      T tanh, slope;
      if constexpr (A::kPointsKeep) {
        tanh = at.tanh[h];
        slope = at.slope[h];
      } else {
        const HyperbolicTangent<T> unit(argument(h, z));
        tanh = unit.tanh;
        slope = unit.slope;
      }
      const T by_shift = gradient * T(amplitude_[h]) * slope;
      sums[1 + h] = A::fma(gradient, tanh, sums[1 + h]);
      sums[1 + units_ + h] = A::fma(by_shift, z, sums[1 + units_ + h]);
      sums[1 + 2 * units_ + h] = sums[1 + 2 * units_ + h] + by_shift;
    }
  }

 private:
  using A = Arithmetic<T>;

  MONOSOFTMAX_HD T argument(int64_t h, T z) const { return A::fma(T(steepness_[h]), z, T(shift_[h])); }

  const S* linear_;
  const S* amplitude_;
  int64_t units_;
  const S* steepness_;
  const S* shift_;
};

}  // namespace monosoftmax
