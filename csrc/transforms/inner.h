// What stands before f: inner(z) = cap tanh(scale z / cap), and scale z where cap is 0. f and the kernels do not know
// of it: they take inner(z) for the logit, and the kernels multiply the gradient of inner(z) by inner'(z).
#pragma once

#include "arithmetic.h"

namespace monosoftmax {

template <class T>
class Inner {
 public:
  using S = typename Arithmetic<T>::Scalar;

  struct Point {
    T value, derivative;
  };

  MONOSOFTMAX_HD Inner(S scale, S cap) : Inner(scale, cap, within(scale, cap)) {}
  // within: as below, computed once for many.
  MONOSOFTMAX_HD Inner(S scale, S cap, S within) : scale_(scale), cap_(cap), within_(within) {}
  static MONOSOFTMAX_HD S within(S scale, S cap) { return cap == 0 ? S(0) : scale / cap; }

  MONOSOFTMAX_HD T value(T z) const { return cap_ == 0 ? T(scale_) * z : at(z).value; }
  // The derivative is accurate where tanh is next to 1, too.
  MONOSOFTMAX_HD Point at(T z) const {
    if (cap_ == 0) return {T(scale_) * z, T(scale_)};
    T slope;
    const T tanh = Arithmetic<T>::tanh(T(within_) * z, slope);
    return {T(cap_) * tanh, T(scale_) * slope};
  }

 private:
  S scale_, cap_, within_;
};

}  // namespace monosoftmax
