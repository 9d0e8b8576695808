// The kernels of the loss of class probabilities. Every class may have a share of the target, so that dL/dy is not a
// multiple of p. So the exponentials are computed twice: once for the loss, and once for the gradient, from logits that
// are still in the L2 cache.
#pragma once

#include "row_passes.h"

namespace monosoftmax::cpu {
namespace {

// The q of a row, tile by tile.
template <class T, class S = typename Arithmetic<T>::Scalar>
class TargetDistribution {
 public:
  TargetDistribution(const ProbabilityTarget<S>& target, int64_t row)
      : target_(target), row_(row), kept_(target.options.kept()), spread_(target.options.spread()) {}
  void start_tile(int64_t begin, int64_t n) {
    begin_ = begin;
    tile_ = load_tile(target_.rows, row_, begin, n, buffer_);
  }
  // Returns q in the lanes at column i, and sets `unsmoothed` to t w there. Only n lanes exist; the others are 0.
  T lanes(int64_t i, int64_t n, T& unsmoothed) const {
    unsmoothed = load<T>(tile_ + (i - begin_), n);
    T spread = spread_;
    if (target_.options.weight != nullptr) {
      const T weight = load<T>(target_.options.weight + i, n);
      unsmoothed = unsmoothed * weight;
      spread = spread * weight;
    }
    const T q = unsmoothed * kept_ + spread;
    if (n >= T::size()) return q;
    unsmoothed = T::set(T(0), unsmoothed, n);
    return T::set(T(0), q, n);
  }
  // The sum of q over a tile of n columns, from the sum of t w. The smoothing is added as a whole: next to a large t,
  // rounding would lose the small shares of the other classes.
  double mass(double unsmoothed, int64_t n) const {
    const ProbabilityOptions<S>& options = target_.options;
    double result = options.kept() * unsmoothed;
    if (options.label_smoothing > 0) {
      const double weights =
          options.weight == nullptr ? static_cast<double>(n) : weighted_sum<S>(options.weight + begin_, nullptr, n);
      result += options.spread() * weights;
    }
    return result;
  }

 private:
  const ProbabilityTarget<S>& target_;
  int64_t row_, begin_ = 0;
  T kept_, spread_;
  const S* tile_ = nullptr;
  alignas(kLine) S buffer_[kTile];
};

// The target's part of dL/dy, if every column has one: see OneColumn.
template <class T, bool kSums, class S = typename Arithmetic<T>::Scalar>
class EveryColumn {
 public:
  EveryColumn(const ProbabilityTarget<S>& target, int64_t row, S grad_loss, S whole)
      : distribution_(target, row), grad_loss_(grad_loss), large_(std::abs(whole) / 8) {}
  void start_tile(int64_t begin, int64_t n, const S*) { distribution_.start_tile(begin, n); }
  // Sets t to the part in the lanes at column i. Returns whether a lane has more than an eighth of the whole: in a sum
  // with such a large term, the many small terms would lose their last digits.
  bool part(int64_t i, int64_t n, T& t) const {
    T unsmoothed;
    t = grad_loss_ * distribution_.lanes(i, n, unsmoothed);
    if constexpr (!kSums) return false;
    constexpr int kAll = (1 << T::size()) - 1;
    return Arithmetic<T>::select(Arithmetic<T>::less(large_, t.abs()), T(1), T(0)).zero_mask() != kAll;
  }

 private:
  TargetDistribution<T> distribution_;
  T grad_loss_, large_;
};

template <class T, class F, class S>
ProbabilityPart<S> scan_part(const F& f, const CrossEntropyCall<S, ProbabilityTarget<S>>& call, int64_t row,
                             int64_t first, int64_t last) {
  using A = Arithmetic<T>;
  LogitTiles<T> tiles(call.input, f.inner());
  TargetDistribution<T> distribution(call.target, row);
  ProbabilityPart<S> part;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t n = std::min(kTile, last - begin);
    const S* z = tiles.load(row, begin, n);
    distribution.start_tile(begin, n);
    const T shift(part.shift(first_lane(f.value(T(largest_of<T>(z, n))))));
    T sum(0), unsmoothed(0), gaps(0);
    for (int64_t strip = 0; strip < n; strip += kStrip) {
      const int64_t end = std::min(strip + kStrip, n);
      // The sums go strip by strip, so that a large t is not rounded again for each of the many small t after it.
      T strip_unsmoothed(0), strip_gaps(0);
      for (int64_t i = strip; i < end; i += T::size()) {
        const T gap = f.value(load<T>(z + i, n - i)) - shift;
        T t;
        const T q = distribution.lanes(begin + i, n - i, t);
        const T p = A::exp(gap);
        sum = sum + (n - i < T::size() ? T::set(T(0), p, n - i) : p);
        strip_unsmoothed = strip_unsmoothed + t;
        // The gap may be -inf where q is 0, and their product would be NaN.
        strip_gaps = strip_gaps + A::select(A::less(T(0), q.abs()), q * gap, T(0));
      }
      unsmoothed = unsmoothed + strip_unsmoothed;
      gaps = gaps + strip_gaps;
    }
    part.add(sum_of_lanes(sum), distribution.mass(sum_of_lanes(unsmoothed), n), sum_of_lanes(gaps));
  }
  return part;
}

template <class S>
void cross_entropy_finish(const CrossEntropyCall<S, ProbabilityTarget<S>>& call, int64_t row,
                          const ProbabilityPart<S>& whole) {
  call.lse[row] = whole.softmax().lse();
  call.stats.largest[row] = whole.softmax().largest();
  call.stats.sum[row] = whole.softmax().sum();
  call.stats.third[row] = whole.mass();
  call.loss[row] = whole.loss(call.target.options);
}

template <class T, class F, class Sums, class S = typename Arithmetic<T>::Scalar>
void backward_rows(const F& f, const CrossEntropyBackwardCall<S, ProbabilityTarget<S>>& call, Sums& sums, int64_t begin,
                   int64_t end, int64_t first, int64_t last) {
  const S inverse = f.inverse_temperature();
  for (int64_t row = begin; row < end; ++row) {
    const S grad_lse = call.grad_lse == nullptr ? S(0) : inverse * call.grad_lse[row];
    const S grad_loss = inverse * (call.grad_loss == nullptr ? call.grad_of_every_loss : call.grad_loss[row]);
    const S largest = call.stats.largest[row], sum = call.stats.sum[row];
    const ProbabilityGradient<S> gradient(call.target.options, call.stats.third[row], grad_loss, grad_lse, largest,
                                          sum);
    const T of_p(gradient.of_p), extra_of_p(gradient.extra_of_p);
    const bool has_extra = gradient.extra_of_p != 0;
    EveryColumn<T, !std::is_same_v<Sums, NoSums>> of_target(call.target, row, grad_loss, gradient.of_p);
    backward_row<T>(f, call.input, row, first, last, largest, sum, of_target, call.grad_input, sums,
                    [&](int64_t, int64_t, T p, T, T t) {
                      const T g = of_p * p - t;
                      return has_extra ? g + extra_of_p * p : g;
                    });
  }
}

template <class S>
void cross_entropy(const CrossEntropyCall<S, ProbabilityTarget<S>>& call, double* coefficients, int64_t begin,
                   int64_t end) {
  using T = at::vec::Vectorized<S>;
  const int64_t classes = call.target.options.classes;
  const bool has_gradient = call.grad_input.data != nullptr || coefficients != nullptr;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    with_sums<T>(f, coefficients, call.transform.size, [&](auto&& sums) {
      for (int64_t row = begin; row < end; ++row) {
        cross_entropy_finish(call, row, scan_part<T>(f, call, row, 0, classes));
        if (has_gradient) backward_rows<T>(f, backward_of(call), sums, row, row + 1, 0, classes);
      }
      sums.finish(1);
    });
  });
}

}  // namespace
}  // namespace monosoftmax::cpu
