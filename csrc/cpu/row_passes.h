// The loops of the kernels over a row of logits, in tiles that stay in the L1 cache. f is increasing, and a temperature
// is positive or makes every y NaN. So the largest y of a tile is that of its largest logit. Hazards: a padded lane of
// the last vector of a row must not reach the sum (f(-inf) may be finite) or the gradient of a coefficient. So its
// exponential and its dL/dy are set to 0.
//
// A loop takes f by value. The compiler must assume that a store of a result changes what a reference refers to, and
// would load the table of f again for each vector of logits.
#pragma once

#include <limits>

#include "../transforms/registry.h"
#include "coefficient_sums.h"
#include "composition.h"
#include "row_kernels.h"

namespace monosoftmax::cpu {
namespace {

// Gradients are computed as if smaller logits had this value. The probability is 0, as for -inf. But z is finite, so
// that 0 times z, in the gradients of the coefficients, is 0 and not NaN.
constexpr double kLowest = -1e30;

// Calls visitor(f) with the transform of a call, Composed.
template <class T, class S, class Visitor>
void with_transform_of(const Transform<S>& transform, Visitor&& visitor) {
  with_transform<T>(transform.name, {transform.coefficients, transform.size, transform.constants},
                    [&](const auto& f) { visitor(Composed<T, std::decay_t<decltype(f)>>(f, transform)); });
}

// The log-sum-exp of columns [first, last) of y. Calls on_tile(begin, n, z, logits) with the inner(z) of each tile, and
// with its logits.
template <class T, class F, class OnTile, class S = typename Arithmetic<T>::Scalar>
OnlineSoftmax<S> scan_row(const F f, const Rows<const void*>& input, int64_t row, int64_t first, int64_t last,
                          OnTile&& on_tile) {
  LogitTiles<T> tiles(input, f.inner());
  OnlineSoftmax<S> state;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t n = std::min(kTile, last - begin);
    const S* z = tiles.load(row, begin, n);
    const T shift(state.shift(first_lane(f.value(T(largest_of<T>(z, n))))));
    T sum(0);
    int64_t i = 0;
    for (; i + T::size() <= n; i += T::size()) {
      sum = sum + Arithmetic<T>::exp(f.value(T::loadu(z + i)) - shift);
    }
    if (i < n) sum = sum + T::set(T(0), Arithmetic<T>::exp(f.value(T::loadu(z + i, n - i)) - shift), n - i);
    state.add(sum_of_lanes(sum));
    on_tile(begin, n, z, tiles.logits());
  }
  return state;
}

// The same for any transform.
template <class S>
OnlineSoftmax<S> softmax_scan(const Rows<const void*>& input, const Transform<S>& transform, int64_t row, int64_t first,
                              int64_t last) {
  using T = at::vec::Vectorized<S>;
  OnlineSoftmax<S> state;
  with_transform_of<T>(transform, [&](const auto& f) {
    state = scan_row<T>(f, input, row, first, last, [](int64_t, int64_t, const S*, const S*) {});
  });
  return state;
}

// The target's part of dL/dy, if only one column has one.
template <class T, class S = typename Arithmetic<T>::Scalar>
class OneColumn {
 public:
  // For the columns [first, last). Column -1: no column has such a part.
  OneColumn(int64_t column, S gradient, int64_t first, int64_t last) {
    if (column < first || last <= column) return;
    lanes_[(column - first) % T::size()] = gradient;
    vector_ = column - (column - first) % T::size();
  }
  void start_tile(int64_t, int64_t, const S*) {}
  // Sets t to the part in the lanes at column i. Returns whether the part is so large that it is added to sums alone.
  bool part(int64_t i, int64_t, T& t) const {
    const bool here = i == vector_;
    t = here ? T::loadu(lanes_) : T(0);
    return here;
  }

 private:
  S lanes_[T::size()] = {};
  int64_t vector_ = -1;
};

// The backward pass of columns [first, last) of one row. gradient_of(i, n, p, gap, t) is dL/df, which is dL/dy over the
// temperature, in the n lanes at column i, from probabilities p, their y - largest, and the target's part t: see
// OneColumn. The row may be overwritten by its gradient.
template <class T, class F, class Target, class Sums, class S, class GradientOf>
void backward_row(const F f, const Rows<const void*>& input, int64_t row, int64_t first, int64_t last, S largest, S sum,
                  Target& target, const Rows<void*>& grad_input, Sums& sums, GradientOf&& gradient_of) {
  LogitTiles<T> tiles(input, f.inner());
  // A row of -inf only has no p: its gradient is NaN, as its loss is.
  const T inverse_sum(sum == 0 ? std::numeric_limits<S>::quiet_NaN() : 1 / sum);
  const T shift(largest), lowest(static_cast<S>(kLowest));
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t n = std::min(kTile, last - begin);
    const S* logits = tiles.load_for_gradients(row, begin, n);
    target.start_tile(begin, n, logits);
    TileWriter<S> writer(grad_input, row, begin, n);
    S* out = grad_input.data == nullptr ? nullptr : writer.place();
    for (int64_t strip = 0; strip < n; strip += kStrip) {
      const int64_t end = std::min(strip + kStrip, n);
      for (int64_t i = strip; i < end; i += T::size()) {
        const T z = at::vec::clamp_min(load<T>(logits + i, n - i), lowest);
        const typename F::Point point = f.at(z);
        const T gap = f.y(point) - shift;
        const T p = Arithmetic<T>::exp(gap) * inverse_sum;
        T of_target;
        const bool alone = target.part(begin + i, n - i, of_target);
        T gradient = gradient_of(begin + i, n - i, p, gap, of_target);
        if (n - i < T::size()) gradient = T::set(T(0), gradient, n - i);
        if (out != nullptr) store(gradient * point.derivative, out + i, n - i);
        if (alone) {
          sums.add_alone(f, point, z, gradient);
          gradient = T(0);
        }
        sums.add(f, point, z, gradient, i - strip);
      }
      sums.end_strip(end - strip);
    }
    sums.end_tile();
    if (out == nullptr) continue;
    tiles.finish_gradients(out, n);
    writer.finish();
  }
}

}  // namespace
}  // namespace monosoftmax::cpu
