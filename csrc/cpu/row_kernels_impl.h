// The kernels of row_kernels.h, compiled once for each instruction set. Everything is in an anonymous namespace, so
// that the linker cannot merge code of one instruction set into another's.
//
// A row is worked through in tiles that stay in the L1 cache. Hazards: a padded lane of the last vector of a row must
// reach neither the sum (its y is set to -inf after the transform: f(-inf) may be finite) nor a coefficient gradient
// (its dL/dy is set to 0).
#pragma once

#include <algorithm>
#include <limits>

#include "../row/online_softmax.h"
#include "../transforms/registry.h"
#include "row_kernels.h"
#include "vectorized.h"

namespace monosoftmax::cpu {
namespace {

constexpr int64_t kTile = 1024;

// Logits below this are taken for it in the backward pass: their probability is 0 as that of -inf is, and the products
// of a gradient of 0 with what the coefficients' gradients need of z stay 0.
constexpr double kLowest = -1e30;

template <class S>
constexpr Element element_of() {
  return std::is_same_v<S, double> ? Element::kDouble : Element::kFloat;
}

inline int64_t bytes_of(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

template <class Half>
void widen(const Half* from, float* to, int64_t n) {
  using H = at::vec::Vectorized<Half>;
  int64_t i = 0;
  for (; i + H::size() <= n; i += H::size()) {
    at::vec::convert<float, 2, Half, 1>(H::loadu(from + i)).store(to + i);
  }
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

template <class Half>
void narrow(const float* from, Half* to, int64_t n) {
  using H = at::vec::Vectorized<Half>;
  int64_t i = 0;
  for (; i + H::size() <= n; i += H::size()) {
    at::vec::convert<Half, 1, float, 2>(at::vec::VectorizedN<float, 2>::loadu(from + i)).store(to + i);
  }
  for (; i < n; ++i) to[i] = static_cast<Half>(from[i]);
}

// Elements [begin, begin + n) of a row as S: where they are if they are of that type, else converted into buffer.
template <class S>
const S* load_tile(const Rows<const void*>& rows, int64_t row, int64_t begin, int64_t n, S* buffer) {
  const char* at = static_cast<const char*>(rows.data) + (row * rows.stride + begin) * bytes_of(rows.element);
  if constexpr (std::is_same_v<S, float>) {
    if (rows.element == Element::kBFloat16) {
      widen(reinterpret_cast<const c10::BFloat16*>(at), buffer, n);
      return buffer;
    }
    if (rows.element == Element::kHalf) {
      widen(reinterpret_cast<const c10::Half*>(at), buffer, n);
      return buffer;
    }
  } else if (rows.element == Element::kFloat) {
    std::copy_n(reinterpret_cast<const float*>(at), n, buffer);
    return buffer;
  }
  return reinterpret_cast<const S*>(at);
}

// Writes n results of type S to elements [begin, begin + n) of a row, rounding each once.
template <class S>
class TileWriter {
 public:
  TileWriter(const Rows<void*>& rows, int64_t row, int64_t begin, int64_t n) : element_(rows.element), n_(n) {
    destination_ = static_cast<char*>(rows.data) + (row * rows.stride + begin) * bytes_of(rows.element);
  }
  // Where to put the results before finish().
  S* place() { return element_ == element_of<S>() ? reinterpret_cast<S*>(destination_) : buffer_; }
  void finish() {
    if (element_ == element_of<S>()) return;
    if (element_ == Element::kDouble) {
      std::copy_n(buffer_, n_, reinterpret_cast<double*>(destination_));
    } else if (element_ == Element::kFloat) {
      std::transform(buffer_, buffer_ + n_, reinterpret_cast<float*>(destination_),
                     [](S x) { return static_cast<float>(x); });
    } else if (element_ == Element::kBFloat16) {
      to_half<c10::BFloat16>();
    } else {
      to_half<c10::Half>();
    }
  }

 private:
  template <class Half>
  void to_half() {
    Half* to = reinterpret_cast<Half*>(destination_);
    if constexpr (std::is_same_v<S, float>) {
      narrow(buffer_, to, n_);
    } else {
      std::transform(buffer_, buffer_ + n_, to, [](S x) { return static_cast<Half>(x); });
    }
  }

  Element element_;
  int64_t n_;
  char* destination_;
  S buffer_[kTile];
};

template <class T>
T load(const typename Arithmetic<T>::Scalar* from, int64_t n) {
  return n >= T::size() ? T::loadu(from) : T::loadu(from, n);
}

template <class T>
void store(T x, typename Arithmetic<T>::Scalar* to, int64_t n) {
  n >= T::size() ? x.store(to) : x.store(to, static_cast<int>(n));
}

template <class T>
double sum_of_lanes(T x) {
  typename Arithmetic<T>::Scalar lanes[T::size()];
  x.store(lanes);
  double sum = 0;
  for (const auto lane : lanes) sum += lane;
  return sum;
}

template <class T>
typename Arithmetic<T>::Scalar largest_of_lanes(T x) {
  typename Arithmetic<T>::Scalar lanes[T::size()];
  x.store(lanes);
  return *std::max_element(lanes, lanes + T::size());
}

// sum_j w_j y_j of one tile; a null weight is 1. In double: the loss subtracts the largest y from it once the row is
// known, and what is left may be small.
template <class S>
double weighted_sum(const S* y, const S* weight, int64_t n) {
  double sum = 0;
  if (weight == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += y[i];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(weight[i]) * y[i];
  }
  return sum;
}

// The log-sum-exp of f(row); on_tile(begin, n, y) is called with the transformed values of each tile.
template <class T, class F, class OnTile, class S = typename Arithmetic<T>::Scalar>
OnlineSoftmax<S> scan_row(const F& f, const Rows<const void*>& input, int64_t row, int64_t classes, OnTile&& on_tile) {
  S buffer[kTile], y[kTile];
  const T lowest(-std::numeric_limits<S>::infinity());
  OnlineSoftmax<S> state;
  for (int64_t begin = 0; begin < classes; begin += kTile) {
    const int64_t n = std::min(kTile, classes - begin);
    const S* z = load_tile(input, row, begin, n, buffer);
    T largest = lowest;
    for (int64_t i = 0; i < n; i += T::size()) {
      T value = f.value(load<T>(z + i, n - i));
      if (n - i < T::size()) value = T::set(lowest, value, n - i);
      value.store(y + i);
      largest = at::vec::maximum(largest, value);
    }
    const T shift(state.shift(largest_of_lanes(largest)));
    T sum(0);
    for (int64_t i = 0; i < n; i += T::size()) {
      sum = sum + (T::loadu(y + i) - shift).exp();
    }
    state.add(sum_of_lanes(sum));
    on_tile(begin, n, static_cast<const S*>(y));
  }
  return state;
}

// Sums of gradient * df/dcoefficient over the logits of a tile, added to `total` once a tile: single precision over
// 1024 / lanes terms, double precision beyond.
template <class T, class F, bool kTable = (F::kTableRows > 0)>
class CoefficientSums {
 public:
  CoefficientSums(const F& f, CoefficientGradient total, int64_t size) : f_(f), total_(total), size_(size) {}
  void start_tile() { std::fill_n(sums_, size_, T(0)); }
  void add(const typename F::Point& point, T z, T gradient, int64_t, bool has_target) {
    if (!has_target) {
      f_.accumulate(point, z, gradient, sums_);
      return;
    }
    // The target's large gradient goes to the double precision sums directly: the many small ones beside it, which
    // often cancel it, would be rounded away.
    T alone[kMostVectorCoefficients];
    std::fill_n(alone, size_, T(0));
    f_.accumulate(point, z, gradient, alone);
    flush(alone);
  }
  void finish_tile(int64_t) { flush(sums_); }

 private:
  void flush(const T* sums) {
    for (int64_t p = 0; p < size_; ++p) total_.sums[p] += sum_of_lanes(sums[p]);
  }

  const F& f_;
  CoefficientGradient total_;
  int64_t size_;
  T sums_[kMostVectorCoefficients];
};

// The same for tables, as double precision histograms over the pieces.
template <class T, class F>
class CoefficientSums<T, F, true> {
 public:
  CoefficientSums(const F& f, CoefficientGradient total, int64_t size) : f_(f), total_(total), size_(size) {}
  void start_tile() {}
  void add(const typename F::Point& point, T z, T gradient, int64_t at, bool) {
    T out[kRows];
    f_.contribute(point, z, gradient, out);
    point.piece.store(piece_ + at);
    for (int r = 0; r < kRows; ++r) out[r].store(contribution_[r] + at);
  }
  void finish_tile(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t copy = i % total_.copies;
      double* entry = total_.sums + (copy * size_ + static_cast<int64_t>(piece_[i])) * kRows;
      for (int r = 0; r < kRows; ++r) entry[r] += contribution_[r][i];
    }
  }

 private:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kRows = F::kTableRows;
  const F& f_;
  CoefficientGradient total_;
  int64_t size_;
  S piece_[kTile];
  S contribution_[kRows][kTile];
};

// What is subtracted from dL/dy in one column only.
template <class S>
struct TargetGradient {
  int64_t column;  // -1: none
  S gradient;
};

// One row of a backward pass. gradient_of(i, n, p, t) is dL/dy of the lanes at column i, of which n exist, with
// probabilities p and the part t that belongs to the target.
template <class T, class F, class Sums, class S, class GradientOf>
void backward_row(const F& f, const Rows<const void*>& input, int64_t row, int64_t classes, S largest, S sum,
                  TargetGradient<S> target, const Rows<void*>& grad_input, Sums* sums, GradientOf&& gradient_of) {
  S buffer[kTile];
  // A row of -inf only has no p: NaN, as its loss.
  const T inverse_sum(sum == 0 ? std::numeric_limits<S>::quiet_NaN() : 1 / sum);
  const T shift(largest), lowest(static_cast<S>(kLowest));
  S target_lanes[T::size()] = {};
  int64_t target_vector = -1;
  if (target.column >= 0) {
    target_lanes[target.column % T::size()] = target.gradient;
    target_vector = target.column - target.column % T::size();
  }
  for (int64_t begin = 0; begin < classes; begin += kTile) {
    const int64_t n = std::min(kTile, classes - begin);
    const S* logits = load_tile(input, row, begin, n, buffer);
    TileWriter<S> writer(grad_input, row, begin, n);
    S* out = grad_input.data == nullptr ? nullptr : writer.place();
    if (sums != nullptr) sums->start_tile();
    for (int64_t i = 0; i < n; i += T::size()) {
      const T z = at::vec::maximum(load<T>(logits + i, n - i), lowest);
      const typename F::Point point = f.at(z);
      const T p = (point.value - shift).exp() * inverse_sum;
      const bool has_target = begin + i == target_vector;
      T gradient = gradient_of(begin + i, n - i, p, has_target ? T::loadu(target_lanes) : T(0));
      if (n - i < T::size()) gradient = T::set(T(0), gradient, n - i);
      if (out != nullptr) store(gradient * point.derivative, out + i, n - i);
      if (sums != nullptr) sums->add(point, z, gradient, i, has_target);
    }
    if (out != nullptr) writer.finish();
    if (sums != nullptr) sums->finish_tile(n);
  }
}

template <class S>
void zero_row(const Rows<void*>& rows, int64_t row, int64_t classes) {
  char* at = static_cast<char*>(rows.data) + row * rows.stride * bytes_of(rows.element);
  std::fill_n(at, classes * bytes_of(rows.element), 0);
}

// Calls visitor(f) with the transform of a call.
template <class T, class S, class Visitor>
void with_transform_of(const Transform<S>& transform, Visitor&& visitor) {
  with_transform<T>(transform.name, {transform.coefficients, transform.size, transform.constants}, visitor);
}

template <class S>
void cross_entropy(const CrossEntropyCall<S>& call, int64_t begin, int64_t end) {
  using T = at::vec::Vectorized<S>;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = call.target[row];
      const bool ignored = target == call.options.ignore_index;
      call.loss[row] = call.lse[row] = call.stats.largest[row] = call.stats.sum[row] = 0;
      if (ignored && !call.lse_of_ignored) continue;
      S target_y = 0;
      double weighted = 0;
      const OnlineSoftmax<S> state =
          scan_row<T>(f, call.input, row, call.options.classes, [&](int64_t at, int64_t n, const S* y) {
            if (at <= target && target < at + n) target_y = y[target - at];
            if (call.options.smooths()) {
              const S* weight = call.options.weight;
              weighted += weighted_sum(y, weight == nullptr ? nullptr : weight + at, n);
            }
          });
      const S largest = state.largest();
      call.lse[row] = state.lse();
      call.stats.largest[row] = largest;
      call.stats.sum[row] = state.sum();
      if (ignored) continue;
      const RowLoss<S> loss(call.options, target);
      const double gaps = weighted - call.options.weight_sum * static_cast<double>(largest);
      call.loss[row] = loss.loss(target_y - largest, gaps, state.log_sum(), call.lse[row]);
    }
  });
}

template <class S>
void cross_entropy_backward(const CrossEntropyBackwardCall<S>& call, CoefficientGradient total, int64_t begin,
                            int64_t end) {
  using T = at::vec::Vectorized<S>;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    using F = std::decay_t<decltype(f)>;
    using Sums = CoefficientSums<T, F>;
    Sums storage(f, total, call.transform.size);
    Sums* sums = total.sums == nullptr ? nullptr : &storage;
    const int64_t classes = call.options.classes;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = call.target[row];
      const bool ignored = target == call.options.ignore_index;
      const S grad_lse = call.grad_lse == nullptr ? S(0) : call.grad_lse[row];
      const S grad_loss = ignored || call.grad_loss == nullptr ? S(0) : call.grad_loss[row];
      if (ignored && grad_lse == 0) {
        if (call.grad_input.data != nullptr) zero_row<S>(call.grad_input, row, classes);
        continue;
      }
      const S largest = call.stats.largest[row], sum = call.stats.sum[row];
      const auto gradient = RowLoss<S>(call.options, ignored ? 0 : target).gradient(grad_loss, grad_lse, largest, sum);
      const T of_p(gradient.of_p), extra_of_p(gradient.extra_of_p), of_weight(gradient.of_weight);
      const bool smooths = gradient.of_weight != 0, has_extra = gradient.extra_of_p != 0;
      const S* weight = call.options.weight;
      const TargetGradient<S> of_target{ignored ? -1 : target, gradient.of_target};
      backward_row<T>(f, call.input, row, classes, largest, sum, of_target, call.grad_input, sums,
                      [&](int64_t i, int64_t n, T p, T t) {
                        if (smooths) {
                          t = t + (weight == nullptr ? of_weight : of_weight * load<T>(weight + i, n));
                        }
                        const T g = of_p * p - t;
                        return has_extra ? g + extra_of_p * p : g;
                      });
    }
  });
}

template <class S>
void log_softmax(const LogSoftmaxCall<S>& call, int64_t begin, int64_t end) {
  using T = at::vec::Vectorized<S>;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    S buffer[kTile];
    for (int64_t row = begin; row < end; ++row) {
      const OnlineSoftmax<S> state = scan_row<T>(f, call.input, row, call.classes, [](int64_t, int64_t, const S*) {});
      const T shift(call.stats.largest[row] = state.largest());
      const T log_sum(state.log_sum());
      call.stats.sum[row] = state.sum();
      for (int64_t at = 0; at < call.classes; at += kTile) {
        const int64_t n = std::min(kTile, call.classes - at);
        const S* z = load_tile(call.input, row, at, n, buffer);
        TileWriter<S> writer(call.output, row, at, n);
        S* out = writer.place();
        for (int64_t i = 0; i < n; i += T::size()) {
          store((f.value(load<T>(z + i, n - i)) - shift) - log_sum, out + i, n - i);
        }
        writer.finish();
      }
    }
  });
}

template <class S>
void log_softmax_backward(const LogSoftmaxBackwardCall<S>& call, CoefficientGradient total, int64_t begin,
                          int64_t end) {
  using T = at::vec::Vectorized<S>;
  with_transform_of<T>(call.transform, [&](const auto& f) {
    using F = std::decay_t<decltype(f)>;
    using Sums = CoefficientSums<T, F>;
    Sums storage(f, total, call.transform.size);
    Sums* sums = total.sums == nullptr ? nullptr : &storage;
    S buffer[kTile];
    for (int64_t row = begin; row < end; ++row) {
      double grad_total = 0;
      for (int64_t at = 0; at < call.classes; at += kTile) {
        const int64_t n = std::min(kTile, call.classes - at);
        const S* grad = load_tile(call.grad_output, row, at, n, buffer);
        grad_total += weighted_sum<S>(grad, nullptr, n);
      }
      const T sum_of_grad(static_cast<S>(grad_total));
      const S* grad = nullptr;
      backward_row<T>(f, call.input, row, call.classes, call.stats.largest[row], call.stats.sum[row],
                      TargetGradient<S>{-1, 0}, call.grad_input, sums, [&](int64_t i, int64_t n, T p, T) {
                        const int64_t in_tile = i % kTile;
                        if (in_tile == 0) {
                          grad = load_tile(call.grad_output, row, i, std::min(kTile, call.classes - i), buffer);
                        }
                        return load<T>(grad + in_tile, n) - sum_of_grad * p;
                      });
    }
  });
}

template <class S>
constexpr RowKernels<S> row_kernels() {
  return {&cross_entropy<S>, &cross_entropy_backward<S>, &log_softmax<S>, &log_softmax_backward<S>};
}

}  // namespace
}  // namespace monosoftmax::cpu
