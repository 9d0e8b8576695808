// Tiles: parts of a row, in the type S of the arithmetic, which are short enough to stay in the L1 cache.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "row_kernels.h"
#include "vectorized.h"

namespace monosoftmax::cpu {
namespace {

constexpr int64_t kTile = 1024;

// Bytes of a cache line. A vector across two cache lines costs two accesses.
constexpr int64_t kLine = 64;

template <class S>
struct alignas(kLine) Tile {
  S x[kTile];
};

template <class S>
constexpr Element element_of() {
  return std::is_same_v<S, double> ? Element::kDouble : Element::kFloat;
}

inline int64_t bytes_of(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

template <class Pointer>
auto* element_at(const Rows<Pointer>& rows, int64_t row, int64_t column) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(rows.data) + (row * rows.stride + column) * bytes_of(rows.element);
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

// to = factor * from, rounded once.
template <class Half>
void narrow(const float* from, float factor, Half* to, int64_t n) {
  using H = at::vec::Vectorized<Half>;
  using Pair = at::vec::VectorizedN<float, 2>;
  const Pair factors(factor);
  int64_t i = 0;
  for (; i + H::size() <= n; i += H::size()) {
    at::vec::convert<Half, 1, float, 2>(Pair::loadu(from + i) * factors).store(to + i);
  }
  for (; i < n; ++i) to[i] = static_cast<Half>(from[i] * factor);
}

// Elements [begin, begin + n) of a row as S. Elements of type S stay in their place, others are converted into buffer.
template <class S>
const S* load_tile(const Rows<const void*>& rows, int64_t row, int64_t begin, int64_t n, S* buffer) {
  const char* at = element_at(rows, row, begin);
  if constexpr (std::is_same_v<S, float>) {
    if (rows.element == Element::kBFloat16) {
      widen(reinterpret_cast<const c10::BFloat16*>(at), buffer, n);
      return buffer;
    }
    if (rows.element == Element::kHalf) {
      widen(reinterpret_cast<const c10::Half*>(at), buffer, n);
      return buffer;
    }
    if (rows.element == Element::kDouble) {
      const double* from = reinterpret_cast<const double*>(at);
      std::transform(from, from + n, buffer, [](double x) { return static_cast<float>(x); });
      return buffer;
    }
  } else if (rows.element != Element::kDouble) {
    if (rows.element == Element::kFloat) {
      std::copy_n(reinterpret_cast<const float*>(at), n, buffer);
    } else if (rows.element == Element::kBFloat16) {
      std::copy_n(reinterpret_cast<const c10::BFloat16*>(at), n, buffer);
    } else {
      std::copy_n(reinterpret_cast<const c10::Half*>(at), n, buffer);
    }
    return buffer;
  }
  return reinterpret_cast<const S*>(at);
}

template <class S>
S load_one(const Rows<const void*>& rows, int64_t row, int64_t column) {
  S buffer[1];
  return *load_tile(rows, row, column, 1, buffer);
}

// Writes n results of type S to elements [begin, begin + n) of a row, rounding each once.
template <class S>
class TileWriter {
 public:
  TileWriter(const Rows<void*>& rows, int64_t row, int64_t begin, int64_t n)
      : element_(rows.element), n_(n), destination_(element_at(rows, row, begin)) {}
  // The place for the results before finish().
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
      narrow(buffer_, 1, to, n_);
    } else {
      std::transform(buffer_, buffer_ + n_, to, [](S x) { return static_cast<Half>(x); });
    }
  }

  Element element_;
  int64_t n_;
  char* destination_;
  alignas(kLine) S buffer_[kTile];
};

// Prefetches the memory of elements [begin, end) of a row, to write to it later.
inline void prefetch(const Rows<void*>& rows, int64_t row, int64_t begin, int64_t end) {
  const char* last = element_at(rows, row, end);
  for (const char* at = element_at(rows, row, begin); at < last; at += kLine) __builtin_prefetch(at, 1);
}

// Writes factor * from to elements [begin, begin + n) of a row of type S or, if S is float, of 16-bit floats.
template <class T, class S = typename Arithmetic<T>::Scalar>
void write_scaled(const S* from, S factor, const Rows<void*>& rows, int64_t row, int64_t begin, int64_t n) {
  char* destination = element_at(rows, row, begin);
  if constexpr (std::is_same_v<S, float>) {
    if (rows.element == Element::kBFloat16) {
      return narrow(from, factor, reinterpret_cast<c10::BFloat16*>(destination), n);
    }
    if (rows.element == Element::kHalf) return narrow(from, factor, reinterpret_cast<c10::Half*>(destination), n);
  }
  const T factors(factor);
  S* to = reinterpret_cast<S*>(destination);
  int64_t i = 0;
  for (; i + T::size() <= n; i += T::size()) (T::loadu(from + i) * factors).store(to + i);
  for (; i < n; ++i) to[i] = from[i] * factor;
}

inline void zero_row(const Rows<void*>& rows, int64_t row, int64_t first, int64_t last) {
  std::fill_n(element_at(rows, row, first), (last - first) * bytes_of(rows.element), 0);
}

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
typename Arithmetic<T>::Scalar first_lane(T x) {
  typename Arithmetic<T>::Scalar lanes[T::size()];
  x.store(lanes);
  return lanes[0];
}

// The largest of n numbers. With a NaN among them it may be any number: the sum of exponentials will be NaN anyway.
template <class T, class S = typename Arithmetic<T>::Scalar>
S largest_of(const S* x, int64_t n) {
  T even(-std::numeric_limits<S>::infinity()), odd = even;
  int64_t i = 0;
  for (; i + 2 * T::size() <= n; i += 2 * T::size()) {
    even = at::vec::clamp_min(T::loadu(x + i), even);
    odd = at::vec::clamp_min(T::loadu(x + i + T::size()), odd);
  }
  S lanes[T::size()];
  at::vec::clamp_min(odd, even).store(lanes);
  S largest = *std::max_element(lanes, lanes + T::size());
  for (; i < n; ++i) largest = std::max(largest, x[i]);
  return largest;
}

// sum_j w_j y_j of one tile; a null weight is 1. The sum is in double: the loss subtracts the largest y of the row from
// it later, and the difference may be small.
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

}  // namespace
}  // namespace monosoftmax::cpu
