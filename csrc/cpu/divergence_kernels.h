// The kernels of the divergences of row/divergence.h, and the backward pass that they share with log_softmax.
//
// A row is swept up to three times: for its log-sum-exp, for the loss with log p at hand, and for the gradient. The
// logits and log q come from memory once, since the later sweeps find a row in the L2 cache. Relative to the largest y,
// log p = (y - largest) - log(sum) has a small error even if the logits are far from 0. The terms of a class are formed
// from it, and not from y and lse, which would be large and nearly cancel. Sums over tiles are in double.
//
// What is different about each divergence works on tiles of y and of log q, and is compiled once for all transforms. A
// transform fills the tile of y, and takes the gradient back. This evaluates f and exp(y) once more, in the L1 cache,
// but a copy of every divergence for every transform would double the time of a build.
#pragma once

#include "../row/divergence.h"
#include "row_passes.h"

namespace monosoftmax::cpu {
namespace {

// Calls visit(i, n, terms) with the terms of a vector of classes after the other. Only n lanes exist.
template <template <class> class Divergence, class T, class S, class Visit>
void for_each_term(S beta, const Distribution<S>& row, const S* y, const S* log_q, int64_t begin, int64_t end,
                   Visit&& visit) {
  using A = Arithmetic<T>;
  const Divergence<T> divergence(beta);
  // A row of -inf only has no p: its loss is NaN.
  const S one_over_sum = row.sum == 0 ? std::numeric_limits<S>::quiet_NaN() : 1 / row.sum;
  const T shift(row.largest), inverse_sum(one_over_sum),
      log_sum(static_cast<S>(std::log(static_cast<double>(row.sum))));
  for (int64_t i = begin; i < end; i += T::size()) {
    const T gap = load<T>(y + i, end - i) - shift;
    const T logarithm = load<T>(log_q + i, end - i);
    visit(i, end - i, divergence.of(gap - log_sum, A::exp(gap) * inverse_sum, logarithm, A::exp(logarithm)));
  }
}

template <template <class> class Divergence, class S>
DivergenceSums sums_of_terms(S beta, const Distribution<S>& row, const S* y, const S* log_q, int64_t n) {
  using T = at::vec::Vectorized<S>;
  T loss(0), gradient(0);
  for (int64_t strip = 0; strip < n; strip += kStrip) {
    // Strip by strip, so that a large term is not rounded again for each of the many small terms after it.
    T strip_loss(0), strip_gradient(0);
    for_each_term<Divergence, T>(beta, row, y, log_q, strip, std::min(strip + kStrip, n),
                                 [&](int64_t, int64_t left, const DivergenceTerms<T>& terms) {
                                   const bool whole = left >= T::size();
                                   strip_loss = strip_loss + (whole ? terms.loss : T::set(T(0), terms.loss, left));
                                   strip_gradient =
                                       strip_gradient + (whole ? terms.gradient : T::set(T(0), terms.gradient, left));
                                 });
    loss = loss + strip_loss;
    gradient = gradient + strip_gradient;
  }
  return {sum_of_lanes(loss), sum_of_lanes(gradient)};
}

template <template <class> class Divergence, class S>
void gradients_of_terms(S beta, const Distribution<S>& row, const S* y, const S* log_q, int64_t n, S factor, S* to) {
  using T = at::vec::Vectorized<S>;
  for_each_term<Divergence, T>(beta, row, y, log_q, 0, n,
                               [&](int64_t i, int64_t left, const DivergenceTerms<T>& terms) {
                                 store(T(factor) * terms.gradient, to + i, left);
                               });
}

template <class S, template <class> class Divergence>
constexpr DivergenceTiles<S> divergence_tiles() {
  return {&sums_of_terms<Divergence, S>, &gradients_of_terms<Divergence, S>};
}

// The y of a tile of inner(z).
template <class T, class F, class S>
void fill_y(const F f, const S* z, int64_t n, S* y) {
  for (int64_t i = 0; i < n; i += T::size()) store(f.value(load<T>(z + i, n - i)), y + i, n - i);
}

// The parts of a DenseBackwardCall in dL/dy, as OneColumn has them for one column.
template <class T, class F, class S = typename Arithmetic<T>::Scalar>
class DenseParts {
 public:
  DenseParts(const F& f, const DenseBackwardCall<S>& call, int64_t row, S factor)
      : f_(f), call_(call), row_(row), factor_(factor) {}
  void start_tile(int64_t begin, int64_t n, const S* z) {
    begin_ = begin;
    tile_ = load_tile(call_.dense, row_, begin, n, buffer_);
    if (call_.divergence == nullptr) return;
    fill_y<T>(f_, z, n, y_);
    const Distribution<S> p{call_.stats.largest[row_], call_.stats.sum[row_]};
    call_.divergence->gradients(call_.beta, p, y_, tile_, n, factor_, buffer_);
    tile_ = buffer_;
  }
  bool part(int64_t i, int64_t n, T& t) const {
    t = load<T>(tile_ + (i - begin_), n);
    return false;
  }

 private:
  const F& f_;
  const DenseBackwardCall<S>& call_;
  int64_t row_, begin_ = 0;
  S factor_;
  const S* tile_ = nullptr;
  alignas(kLine) S buffer_[kTile];
  alignas(kLine) S y_[kTile];
};

template <class S>
void dense_backward(const DenseBackwardCall<S>& call, double* coefficients, int64_t begin, int64_t end, int64_t first,
                    int64_t last) {
  using T = at::vec::Vectorized<S>;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    with_sums<T>(f, coefficients, call.transform.size, [&](auto&& sums) {
      const T inverse(f.inverse_temperature());
      for (int64_t row = begin; row < end; ++row) {
        const S grad_loss = call.grad_loss == nullptr ? call.grad_of_every_loss : call.grad_loss[row];
        const T of_p(call.divergence == nullptr ? static_cast<S>(call.grad_sum[row])
                                                : grad_loss * call.stats.third[row]);
        DenseParts<T, std::decay_t<decltype(f)>> parts(f, call, row, grad_loss);
        backward_row<T>(f, call.input, row, first, last, call.stats.largest[row], call.stats.sum[row], parts,
                        call.grad_input, sums,
                        [&](int64_t, int64_t, T p, T, T part) { return (part - of_p * p) * inverse; });
      }
      sums.finish(1);
    });
  });
}

// The sums over columns [first, last) of a row whose log-sum-exp is known.
template <class S>
DivergenceSums divergence_scan(const DivergenceCall<S>& call, int64_t row, const OnlineSoftmax<S>& whole, int64_t first,
                               int64_t last) {
  using T = at::vec::Vectorized<S>;
  const DenseBackwardCall<S>& operands = call.backward;
  const Distribution<S> p{whole.largest(), whole.sum()};
  DivergenceSums sums;
  with_transform_of<T>(operands.transform, [&](const auto& f) {
    LogitTiles<T> tiles(operands.input, f.inner());
    alignas(kLine) S y[kTile], buffer[kTile];
    for (int64_t begin = first; begin < last; begin += kTile) {
      const int64_t n = std::min(kTile, last - begin);
      fill_y<T>(f, tiles.load(row, begin, n), n, y);
      const S* log_q = load_tile(operands.dense, row, begin, n, buffer);
      sums.merge(operands.divergence->sums(operands.beta, p, y, log_q, n));
    }
  });
  return sums;
}

template <class S>
void divergence_finish(const DivergenceCall<S>& call, int64_t row, const OnlineSoftmax<S>& whole,
                       const DivergenceSums& sums) {
  call.stats.largest[row] = whole.largest();
  call.stats.sum[row] = whole.sum();
  call.stats.third[row] = static_cast<S>(sums.gradient);
  call.loss[row] = static_cast<S>(sums.loss);
  call.lse[row] = whole.lse();
}

template <class S>
void divergence(const DivergenceCall<S>& call, double* coefficients, int64_t begin, int64_t end) {
  const DenseBackwardCall<S>& backward = call.backward;
  const bool has_gradient = backward.grad_input.data != nullptr || coefficients != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const OnlineSoftmax<S> whole = softmax_scan(backward.input, backward.transform, row, 0, call.classes);
    divergence_finish(call, row, whole, divergence_scan(call, row, whole, 0, call.classes));
    if (has_gradient) dense_backward(backward, coefficients, row, row + 1, 0, call.classes);
  }
}

}  // namespace
}  // namespace monosoftmax::cpu
