// The kernels of row_kernels.h, compiled once for each instruction set. All names are in an anonymous namespace, or in
// a namespace with the name of the instruction set: the linker must not merge the code of two instruction sets.
//
// This file has the kernels of class indices and of log_softmax, row_passes.h the loops over a row,
// probability_kernels.h the kernels of class probabilities, and divergence_kernels.h those of the divergences.
#pragma once

#include <vector>

#include "divergence_kernels.h"
#include "probability_kernels.h"
#include "row_passes.h"

namespace monosoftmax::cpu {
namespace {

template <class T, class F, class Sums, class S = typename Arithmetic<T>::Scalar>
void backward_rows(const F& f, const CrossEntropyBackwardCall<S, IndexTarget<S>>& call, Sums& sums, int64_t begin,
                   int64_t end, int64_t first, int64_t last) {
  const S inverse = f.inverse_temperature();
  const T lowest(static_cast<S>(kLowest));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = call.target.index[row];
    const bool ignored = call.target.ignores(row);
    const S grad_lse = call.grad_lse == nullptr ? S(0) : call.grad_lse[row];
    const S grad_entropy = call.grad_entropy == nullptr ? S(0) : call.grad_entropy[row];
    const S grad_loss = ignored ? S(0) : call.grad_loss == nullptr ? call.grad_of_every_loss : call.grad_loss[row];
    if (ignored && grad_lse == 0 && grad_entropy == 0) {
      if (call.grad_input.data != nullptr) zero_row(call.grad_input, row, first, last);
      continue;
    }
    const S largest = call.stats.largest[row], sum = call.stats.sum[row];
    const RowLoss<S> loss(call.target.options, ignored ? 0 : target);
    const auto gradient = loss.gradient(inverse * grad_loss, inverse * grad_lse, largest, sum);
    const T of_p(gradient.of_p), extra_of_p(gradient.extra_of_p), of_weight(gradient.of_weight);
    // sum_j p_j (largest - y_j). Relative to the largest y, nothing cancels in y_j - largest + gaps.
    const T of_entropy(inverse * grad_entropy), gaps(grad_entropy == 0 ? S(0) : call.stats.third[row]);
    const bool smooths = gradient.of_weight != 0, has_entropy = grad_entropy != 0;
    const bool has_extra = gradient.extra_of_p != 0 || has_entropy;
    const S* weight = call.target.options.weight;
    OneColumn<T> of_target(ignored ? -1 : target, gradient.of_target, first, last);
    backward_row<T>(f, call.input, row, first, last, largest, sum, of_target, call.grad_input, sums,
                    [&](int64_t i, int64_t n, T p, T gap, T t) {
                      if (smooths) t = t + (weight == nullptr ? of_weight : of_weight * load<T>(weight + i, n));
                      const T g = of_p * p - t;
                      if (!has_extra) return g;
                      T extra = extra_of_p;
                      // A gap may be -inf even though the logit is raised, and p is 0 there.
                      if (has_entropy) extra = extra - of_entropy * (at::vec::clamp_min(gap, lowest) + gaps);
                      return g + extra * p;
                    });
  }
}

template <class S, class Target>
void cross_entropy_backward(const CrossEntropyBackwardCall<S, Target>& call, double* coefficients, int64_t begin,
                            int64_t end, int64_t first, int64_t last) {
  using T = at::vec::Vectorized<S>;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    with_sums<T>(f, coefficients, call.transform.size, [&](auto&& sums) {
      backward_rows<T>(f, call, sums, begin, end, first, last);
      sums.finish(1);
    });
  });
}

template <class T, class F, class S>
RowPart<S> scan_part(const F& f, const CrossEntropyCall<S, IndexTarget<S>>& call, int64_t row, int64_t first,
                     int64_t last) {
  const int64_t target = call.target.index[row];
  const LossOptions<S>& options = call.target.options;
  RowPart<S> part;
  part.softmax = scan_row<T>(f, call.input, row, first, last, [&](int64_t at, int64_t n, const S* z, const S*) {
    if (at <= target && target < at + n) part.target_y = first_lane(f.value(T(z[target - at])));
    if (options.smooths()) {
      alignas(kLine) S y[kTile];
      for (int64_t i = 0; i < n; i += T::size()) store(f.value(load<T>(z + i, n - i)), y + i, n - i);
      part.weighted += weighted_sum(y, options.weight == nullptr ? nullptr : options.weight + at, n);
    }
  });
  return part;
}

template <class S>
void cross_entropy_finish(const CrossEntropyCall<S, IndexTarget<S>>& call, int64_t row, const RowPart<S>& whole) {
  const S largest = whole.softmax.largest();
  call.lse[row] = whole.softmax.lse();
  call.stats.largest[row] = largest;
  call.stats.sum[row] = whole.softmax.sum();
  if (call.target.ignores(row)) return;
  const RowLoss<S> loss(call.target.options, call.target.index[row]);
  const double gaps = whole.weighted - call.target.options.weight_sum * static_cast<double>(largest);
  call.loss[row] = loss.loss(whole.target_y - largest, gaps, whole.softmax.log_sum(), call.lse[row]);
}

// Computes the loss and the gradient of a row, with one evaluation of f and of the exponential. The first sweep writes
// exp(y - shift) f', with the shift that is known at its tile. The second sweep, in the L2 cache, multiplies by the
// factor that is missing. Not for smoothed labels: their part of the gradient is not a multiple of p.
template <class T, class F, class Sums, class S = typename Arithmetic<T>::Scalar>
void row_with_gradient(const F f, const CrossEntropyCall<S, IndexTarget<S>>& call, int64_t row,
                       std::vector<Tile<S>>& unscaled_row, std::vector<S>& shifts, Sums& sums) {
  using A = Arithmetic<T>;
  const int64_t classes = call.target.options.classes, target = call.target.index[row];
  const bool in_place = call.grad_input.element == element_of<S>();
  S* unscaled = nullptr;
  if (call.grad_input.data != nullptr) {
    unscaled_row.resize(in_place ? 0 : (classes + kTile - 1) / kTile);
    unscaled = reinterpret_cast<S*>(in_place ? element_at(call.grad_input, row, 0)
                                             : reinterpret_cast<char*>(unscaled_row.data()));
  }
  const T lowest(static_cast<S>(kLowest));
  LogitTiles<T> tiles(call.input, f.inner());
  S slope_at_target;
  const T target_z(tiles.load_one(row, target, slope_at_target));
  const int64_t target_vector = target - target % T::size();
  S but_target[T::size()];
  for (int i = 0; i < T::size(); ++i) but_target[i] = target_vector + i == target ? 0 : 1;

  RowPart<S> whole;
  shifts.clear();
  for (int64_t begin = 0; begin < classes; begin += kTile) {
    const int64_t n = std::min(kTile, classes - begin);
    const S* logits = tiles.load_for_gradients(row, begin, n);
    const S previous = whole.softmax.largest();
    shifts.push_back(whole.softmax.shift(first_lane(f.value(T(largest_of<T>(logits, n))))));
    if (begin > 0 && whole.softmax.largest() != previous) {
      sums.rescale(std::exp(static_cast<double>(previous) - whole.softmax.largest()));
    }
    const T shift(shifts.back());
    T sum(0);
    for (int64_t strip = 0; strip < n; strip += kStrip) {
      const int64_t end = std::min(strip + kStrip, n);
      if (unscaled != nullptr && !in_place) prefetch(call.grad_input, row, begin + strip, begin + end);
      for (int64_t i = strip; i < end; i += T::size()) {
        const T z = at::vec::clamp_min(load<T>(logits + i, n - i), lowest);
        const typename F::Point point = f.at(z);
        T p = A::exp(f.y(point) - shift);
        if (n - i < T::size()) p = T::set(T(0), p, n - i);
        sum = sum + p;
        if (unscaled != nullptr) store(p * point.derivative, unscaled + begin + i, n - i);
        if (begin + i == target_vector) p = p * T::loadu(but_target);
        sums.add(f, point, z, p, i - strip);
      }
      sums.end_strip(end - strip);
    }
    sums.end_tile();
    if (unscaled != nullptr) tiles.finish_gradients(unscaled + begin, n);
    whole.softmax.add(sum_of_lanes(sum));
  }

  whole.target_y = first_lane(f.value(target_z));
  cross_entropy_finish(call, row, whole);
  const S largest = call.stats.largest[row], sum = call.stats.sum[row];
  const auto gradient =
      RowLoss<S>(call.target.options, target).gradient(f.inverse_temperature() * call.grad_loss, 0, largest, sum);
  const double of_p = static_cast<double>(gradient.of_p) + gradient.extra_of_p;
  const S inverse_sum = sum == 0 ? std::numeric_limits<S>::quiet_NaN() : 1 / sum;
  sums.finish(of_p * inverse_sum);

  // The column of the target goes alone: its two large parts cancel if p is next to 1.
  const T z = at::vec::clamp_min(target_z, lowest);
  const typename F::Point point = f.at(z);
  const T p = A::exp(f.y(point) - T(largest)) * T(inverse_sum);
  const T of_target = (T(gradient.of_p) * p - T(gradient.of_target)) + T(gradient.extra_of_p) * p;
  S alone[T::size()] = {first_lane(of_target)};
  sums.add_alone(f, point, z, T::loadu(alone));
  if (unscaled == nullptr) return;
  for (int64_t begin = 0, tile = 0; begin < classes; begin += kTile, ++tile) {
    const int64_t n = std::min(kTile, classes - begin);
    const S factor = static_cast<S>(of_p * inverse_sum * std::exp(static_cast<double>(shifts[tile]) - largest));
    write_scaled<T>(unscaled + begin, factor, call.grad_input, row, begin, n);
  }
  const S at_target = first_lane(of_target * point.derivative) * slope_at_target;
  write_scaled<T>(&at_target, S(1), call.grad_input, row, target, 1);
}

template <class S>
void cross_entropy(const CrossEntropyCall<S, IndexTarget<S>>& call, double* coefficients, int64_t begin, int64_t end) {
  using T = at::vec::Vectorized<S>;
  const int64_t classes = call.target.options.classes;
  const bool has_gradient = call.grad_input.data != nullptr || coefficients != nullptr;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    with_sums<T>(f, coefficients, call.transform.size, [&](auto&& sums) {
      std::vector<Tile<S>> unscaled_row;
      std::vector<S> shifts;
      for (int64_t row = begin; row < end; ++row) {
        const bool ignored = call.target.ignores(row);
        call.loss[row] = call.lse[row] = call.stats.largest[row] = call.stats.sum[row] = 0;
        if constexpr (std::decay_t<decltype(sums)>::kRescales) {
          if (has_gradient && !ignored && !call.target.options.smooths()) {
            row_with_gradient<T>(f, call, row, unscaled_row, shifts, sums);
            continue;
          }
        }
        if (call.target.counts(row)) {
          cross_entropy_finish(call, row, scan_part<T>(f, call, row, 0, classes));
        }
        if (has_gradient) backward_rows<T>(f, backward_of(call), sums, row, row + 1, 0, classes);
      }
      sums.finish(1);
    });
  });
}

template <class S, class Target>
typename Target::Part cross_entropy_scan(const CrossEntropyCall<S, Target>& call, int64_t row, int64_t first,
                                         int64_t last) {
  using T = at::vec::Vectorized<S>;
  typename Target::Part part;
  with_transform_of<T>(call.transform, [&](const auto& f) { part = scan_part<T>(f, call, row, first, last); });
  return part;
}

template <class S>
void token_statistics(const TokenStatisticsCall<S>& call, int64_t begin, int64_t end) {
  using T = at::vec::Vectorized<S>;
  using A = Arithmetic<T>;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    LogitTiles<T> tiles(call.input, f.inner());
    const T farthest(static_cast<S>(-kLowest));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = call.target[row];
      const bool valid = target != call.ignore_index;
      const S target_z = valid ? load_one<S>(call.input, row, target) : S(0);
      S best = -std::numeric_limits<S>::infinity();
      int64_t best_at = 0;
      double larger = 0;
      // One sweep: the largest y, the sum and the entropy need the same f and the same exponential.
      OnlineEntropy<S> entropy;
      for (int64_t at = 0; at < call.classes; at += kTile) {
        const int64_t n = std::min(kTile, call.classes - at);
        const S* inner = tiles.load(row, at, n);
        const S* z = tiles.logits();
        const S largest = largest_of<T>(z, n);
        const T shift(entropy.shift(first_lane(f.value(T(inner == z ? largest : largest_of<T>(inner, n))))));
        T sum(0), gaps(0);
        for (int64_t i = 0; i < n; i += T::size()) {
          const T y = f.value(load<T>(inner + i, n - i));
          T e = A::exp(y - shift);
          if (n - i < T::size()) e = T::set(T(0), e, n - i);
          sum = sum + e;
          // -inf has a finite gap, so that 0 times the gap is 0.
          gaps = A::fma(e, at::vec::clamp_max(shift - y, farthest), gaps);
        }
        entropy.add(sum_of_lanes(sum), sum_of_lanes(gaps));
        if (!(largest <= best) && !std::isnan(best)) {
          best = largest;
          best_at = at;
          while (!(z[best_at - at] == best || std::isnan(z[best_at - at]))) ++best_at;
        }
        T count(0);
        for (int64_t i = 0; i < n; i += T::size()) {
          const T one = A::select(A::less(T(target_z), load<T>(z + i, n - i)), T(1), T(0));
          count = count + (n - i < T::size() ? T::set(T(0), one, n - i) : one);
        }
        larger += sum_of_lanes(count);
      }
      const OnlineSoftmax<S>& state = entropy.softmax();
      S slope;
      const S target_y = valid ? first_lane(f.value(T(tiles.load_one(row, target, slope)))) : S(0);
      call.log_prob[row] = valid ? (target_y - state.largest()) - state.log_sum() : S(0);
      const double gap = entropy.gap();
      call.entropy[row] = static_cast<S>(static_cast<double>(state.log_sum()) + gap);
      call.stats.largest[row] = state.largest();
      call.stats.sum[row] = state.sum();
      call.stats.third[row] = static_cast<S>(gap);
      call.argmax[row] = best_at;
      call.lse[row] = state.lse();
      call.rank[row] = valid ? static_cast<int64_t>(larger) : -1;
    }
  });
}

template <class S>
void log_softmax_finish(const LogSoftmaxCall<S>& call, int64_t row, const OnlineSoftmax<S>& whole, int64_t first,
                        int64_t last) {
  using T = at::vec::Vectorized<S>;
  call.stats.largest[row] = whole.largest();
  call.stats.sum[row] = whole.sum();
  const T shift(whole.largest()), log_sum(whole.log_sum());
  with_transform_of<T>(call.transform, [&](const auto& f) {
    LogitTiles<T> tiles(call.input, f.inner());
    for (int64_t at = first; at < last; at += kTile) {
      const int64_t n = std::min(kTile, last - at);
      const S* z = tiles.load(row, at, n);
      TileWriter<S> writer(call.output, row, at, n);
      S* out = writer.place();
      for (int64_t i = 0; i < n; i += T::size()) {
        store((f.value(load<T>(z + i, n - i)) - shift) - log_sum, out + i, n - i);
      }
      writer.finish();
    }
  });
}

template <class S>
void log_softmax(const LogSoftmaxCall<S>& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const OnlineSoftmax<S> whole = softmax_scan(call.input, call.transform, row, 0, call.classes);
    log_softmax_finish(call, row, whole, 0, call.classes);
  }
}

template <class S>
double sum_of_row(const Rows<const void*>& rows, int64_t row, int64_t first, int64_t last) {
  alignas(kLine) S buffer[kTile];
  double sum = 0;
  for (int64_t at = first; at < last; at += kTile) {
    const int64_t n = std::min(kTile, last - at);
    sum += weighted_sum<S>(load_tile(rows, row, at, n, buffer), nullptr, n);
  }
  return sum;
}

template <class S, class Target>
constexpr LossKernels<S, Target> loss_kernels() {
  return {&cross_entropy, &cross_entropy_scan<S, Target>, &cross_entropy_finish, &cross_entropy_backward<S, Target>};
}

template <class S>
constexpr RowKernels<S> row_kernels() {
  return {loss_kernels<S, IndexTarget<S>>(),
          loss_kernels<S, ProbabilityTarget<S>>(),
          &token_statistics<S>,
          &log_softmax<S>,
          &softmax_scan<S>,
          &log_softmax_finish<S>,
          &sum_of_row<S>,
          &dense_backward<S>,
          divergence_tiles<S, ForwardKl>(),
          divergence_tiles<S, ReverseKl>(),
          divergence_tiles<S, Jsd>(),
          &divergence<S>,
          &divergence_scan<S>,
          &divergence_finish<S>};
}

}  // namespace
}  // namespace monosoftmax::cpu
