// The composition y = f(inner(z)) / temperature around a transform f, for all kernels.
//
// inner is at work where a tile of logits is loaded and where a tile of gradients is complete, so that the loops over
// logits know nothing of it: they take inner(z) for the logit z. The temperature is a factor of y, and of the upstream
// gradients of a row. No other code multiplies y by 1 / temperature: y must be rounded alike in the largest y, in the
// sum and in the gradients. Folded into the exponential, as exp(fma(f, 1 / temperature, -largest)), the product would
// cost nothing, but the gap of the largest y to itself would not be 0, and a small loss would be lost in it.
#pragma once

#include "../transforms/inner.h"
#include "tiles.h"

namespace monosoftmax::cpu {
namespace {

// f over the temperature. The points are those of f, as are the gradients of its coefficients: a kernel multiplies
// dL/dy by inverse_temperature(), which is dL/df.
template <class T, class F>
class Composed : public F {
 public:
  using S = typename Arithmetic<T>::Scalar;

  Composed(const F& f, const Transform<S>& whole)
      : F(f),
        divides_(whole.inverse_temperature != 1),
        inverse_(whole.inverse_temperature),
        inverse_temperature_(whole.inverse_temperature),
        inner_(whole.inner) {}

  // The y of inner(z).
  T value(T z) const { return over_temperature(F::value(z)); }
  T y(const typename F::Point& point) const { return over_temperature(point.value); }
  S inverse_temperature() const { return inverse_temperature_; }
  const InnerNumbers<S>& inner() const { return inner_; }

 private:
  // The branch is always predicted. A product with 1 would make the loss of plain logits slower by 7 %.
  T over_temperature(T value) const { return divides_ ? value * inverse_ : value; }

  bool divides_;
  T inverse_;
  S inverse_temperature_;
  InnerNumbers<S> inner_;
};

// Writes inner(z) and, if `slopes` is not null, inner'(z). Not inlined: one copy serves all transforms.
template <class T, class S = typename Arithmetic<T>::Scalar>
__attribute__((noinline)) void apply_inner(const InnerNumbers<S>& numbers, const S* z, int64_t n, S* values,
                                           S* slopes) {
  const Inner<T> inner(numbers.scale, numbers.cap);
  for (int64_t i = 0; i < n; i += T::size()) {
    const auto point = inner.at(load<T>(z + i, n - i));
    store(point.value, values + i, n - i);
    if (slopes != nullptr) store(point.derivative, slopes + i, n - i);
  }
}

// Multiplies gradients of inner(z) by inner'(z).
template <class T, class S = typename Arithmetic<T>::Scalar>
__attribute__((noinline)) void multiply_by(const S* slopes, S* gradients, int64_t n) {
  for (int64_t i = 0; i < n; i += T::size()) {
    store(load<T>(gradients + i, n - i) * load<T>(slopes + i, n - i), gradients + i, n - i);
  }
}

// The tiles of a row of logits, as f takes them.
template <class T, class S = typename Arithmetic<T>::Scalar>
class LogitTiles {
 public:
  LogitTiles(const Rows<const void*>& rows, const InnerNumbers<S>& inner) : rows_(rows), inner_(inner) {}

  // inner(z) of elements [begin, begin + n) of a row.
  const S* load(int64_t row, int64_t begin, int64_t n) {
    logits_ = load_tile(rows_, row, begin, n, buffer_);
    if (!inner_.present()) return logits_;
    apply_inner<T>(inner_, logits_, n, values_, static_cast<S*>(nullptr));
    return values_;
  }
  // The same, before a call of finish_gradients. The logits may be overwritten between the two.
  const S* load_for_gradients(int64_t row, int64_t begin, int64_t n) {
    logits_ = load_tile(rows_, row, begin, n, buffer_);
    if (!inner_.present()) return logits_;
    apply_inner<T>(inner_, logits_, n, values_, slopes_);
    return values_;
  }
  // Turns gradients of inner(z) of the tile into gradients of z.
  void finish_gradients(S* gradients, int64_t n) const {
    if (inner_.present()) multiply_by<T>(slopes_, gradients, n);
  }
  // The tile without inner.
  const S* logits() const { return logits_; }

  // inner(z) of one element, and inner'(z).
  S load_one(int64_t row, int64_t column, S& slope) const {
    S value = cpu::load_one<S>(rows_, row, column);
    slope = 1;
    if (inner_.present()) apply_inner<T>(inner_, &value, 1, &value, &slope);
    return value;
  }

 private:
  const Rows<const void*>& rows_;
  const InnerNumbers<S> inner_;
  const S* logits_ = nullptr;
  alignas(kLine) S buffer_[kTile];
  alignas(kLine) S values_[kTile];
  alignas(kLine) S slopes_[kTile];
};

}  // namespace
}  // namespace monosoftmax::cpu
