// Arithmetic of the transforms on torch's SIMD vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "../transforms/arithmetic.h"

namespace monosoftmax {

template <class S>
struct Arithmetic<at::vec::Vectorized<S>> {
  using Scalar = S;
  using T = at::vec::Vectorized<S>;
  using Mask = T;

  static T exp(T x) { return x.exp(); }
  static T log1p(T x) { return x.log1p(); }
  static T tanh(T x) { return x.tanh(); }
  static T abs(T x) { return x.abs(); }
  static T floor(T x) { return x.floor(); }
  static T fma(T a, T b, T c) { return at::vec::fmadd(a, b, c); }
  static Mask less(T a, T b) { return a < b; }
  static Mask less_equal(T a, T b) { return a <= b; }
  static T select(Mask mask, T a, T b) { return T::blendv(b, a, mask); }
  static T gather(const S* base, T index) {
    return at::vec::gather<sizeof(S)>(base, at::vec::convert_to_int_of_same_size(index));
  }
};

}  // namespace monosoftmax
