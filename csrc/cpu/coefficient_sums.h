// Sums over logits of weight * df/dcoefficient. With the weight dL/dy they are the gradients of the coefficients.
//
// A kernel calls add() for each vector of logits, end_strip() and end_tile() after each strip and each tile, and
// finish() with the factor that its weights still lack. Weights may be relative to the largest y so far. When a tile
// has a larger y, rescale() multiplies the sums so far. At most a few thousand terms are added in the type of the
// arithmetic, everything else in double precision.
#pragma once

#include "tiles.h"

namespace monosoftmax::cpu {
namespace {

// The logits of a strip. Their contributions to a table are kept, and then added one after the other.
constexpr int64_t kStrip = 128;

// The most pieces for which a row has its own histogram beside the total. Only such a histogram can be rescaled.
constexpr int64_t kSmallHistogram = 256;

struct NoSums {
  static constexpr bool kRescales = true;
  template <class F, class T>
  void add(const F&, const typename F::Point&, T, T, int64_t) {}
  template <class F, class T>
  void add_alone(const F&, const typename F::Point&, T, T) {}
  void end_strip(int64_t) {}
  void end_tile() {}
  void rescale(double) {}
  void finish(double) {}
};

template <class T, class F>
class VectorSums {
 public:
  static constexpr bool kRescales = true;

  VectorSums(double* total, int64_t size) : total_(total), size_(size) {
    std::fill_n(lanes_, size_, T(0));
    std::fill_n(sums_, size_, 0.0);
  }
  void add(const F& f, const typename F::Point& point, T z, T weight, int64_t) {
    f.accumulate(point, z, weight, lanes_);
  }
  // Adds one large weight to the total directly: the sum of the many small weights nearly cancels it.
  void add_alone(const F& f, const typename F::Point& point, T z, T weight) {
    T alone[kMostVectorCoefficients];
    std::fill_n(alone, size_, T(0));
    f.accumulate(point, z, weight, alone);
    for (int64_t p = 0; p < size_; ++p) total_[p] += sum_of_lanes(alone[p]);
  }
  void end_strip(int64_t) {}
  void end_tile() {
    for (int64_t p = 0; p < size_; ++p) {
      sums_[p] += sum_of_lanes(lanes_[p]);
      lanes_[p] = T(0);
    }
  }
  void rescale(double factor) {
    for (int64_t p = 0; p < size_; ++p) sums_[p] *= factor;
  }
  void finish(double factor) {
    for (int64_t p = 0; p < size_; ++p) {
      total_[p] += factor * sums_[p];
      sums_[p] = 0;
    }
  }

 private:
  double* total_;
  int64_t size_;
  T lanes_[kMostVectorCoefficients];
  double sums_[kMostVectorCoefficients];
};

// The contributions of a strip of logits, each to the table entry of its piece.
template <class T, class F>
class Strip {
 public:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kStride = table_stride(F::kTableRows);
  using Index = at::vec::int_same_size_t<S>;

  void set(const F& f, const typename F::Point& point, T z, T weight, int64_t at) {
    T out[F::kTableRows];
    f.differentiate(point, z, out);
    for (int r = 0; r < F::kTableRows; ++r) out[r] = weight * out[r];
    at::vec::convert_to_int_of_same_size(point.piece * T(kStride)).store(entry_ + at);
    if constexpr (kStride == 2) {
      const auto [first, second] = at::vec::interleave2(out[0], out[1]);
      first.store(contribution_ + 2 * at);
      second.store(contribution_ + 2 * at + T::size());
    } else {
      T streams[kStride];
#pragma GCC unroll 8
      for (int r = 0; r < kStride; ++r) streams[r] = r < F::kTableRows ? out[r] : T(0);
      interleave<kStride / 2>(streams);
#pragma GCC unroll 8
      for (int r = 0; r < kStride; ++r) streams[r].store(contribution_ + kStride * at + r * T::size());
    }
  }
  // The place of the entry of logit i in a table.
  Index entry(int64_t i) const { return entry_[i]; }
  // Adds the contribution of logit i to an entry, as one vector. In a loop over numbers, the compiler would have to
  // assume that the contribution and the entry overlap.
  template <class Sum>
  void add_to(Sum* entry, int64_t i) const {
    typedef S Contribution __attribute__((vector_size(kStride * sizeof(S)), may_alias));
    typedef Sum Entry __attribute__((vector_size(kStride * sizeof(Sum)), may_alias));
    const Contribution& from = *reinterpret_cast<const Contribution*>(contribution_ + kStride * i);
    Entry& to = *reinterpret_cast<Entry*>(entry);
    if constexpr (std::is_same_v<S, Sum>) {
      to += from;
    } else {
      to += __builtin_convertvector(from, Entry);
    }
  }

 private:
  // Moves streams[r][i] to place kStride * i + r. Each round interleaves stream r with stream r + half, until there is
  // one stream.
  template <int half>
  static void interleave(T (&streams)[kStride]) {
    constexpr int kWidth = kStride / 2 / half;  // vectors of a stream in this round
    T next[kStride];
#pragma GCC unroll 8
    for (int i = 0; i < kStride / 2; ++i) {
      const auto [first, second] = at::vec::interleave2(streams[i], streams[i + half * kWidth]);
      next[2 * i] = first;
      next[2 * i + 1] = second;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kStride; ++r) streams[r] = next[r];
    if constexpr (half > 1) interleave<half / 2>(streams);
  }

  Index entry_[kStrip];
  alignas(kLine) S contribution_[kStrip * kStride];
};

template <class T, class F>
void add_to_table(const F& f, const typename F::Point& point, T z, T weight, double* table) {
  constexpr int kStride = table_stride(F::kTableRows);
  T out[F::kTableRows];
  f.differentiate(point, z, out);
  for (int r = 0; r < F::kTableRows; ++r) out[r] = weight * out[r];
  typename Arithmetic<T>::Scalar piece[T::size()], lanes[T::size()];
  point.piece.store(piece);
  for (int r = 0; r < F::kTableRows; ++r) {
    out[r].store(lanes);
    for (int i = 0; i < T::size(); ++i) table[static_cast<int64_t>(piece[i]) * kStride + r] += lanes[i];
  }
}

// Keeps four copies of the table, so that additions of successive logits to one piece do not wait for each other.
template <class T, class F>
class SmallHistogram {
 public:
  static constexpr bool kRescales = true;

  SmallHistogram(double* total, int64_t pieces) : total_(total), size_(pieces * kStride) {
    for (int c = 0; c < kCopies; ++c) std::fill_n(copies_ + c * kCopyStride, size_, S(0));
    std::fill_n(sums_, size_, 0.0);
  }
  void add(const F& f, const typename F::Point& point, T z, T weight, int64_t at) {
    strip_.set(f, point, z, weight, at);
  }
  void add_alone(const F& f, const typename F::Point& point, T z, T weight) {
    add_to_table(f, point, z, weight, total_);
  }
  void end_strip(int64_t n) {
    int64_t i = 0;
    for (; i + kCopies <= n; i += kCopies) {
#pragma GCC unroll 4
      for (int c = 0; c < kCopies; ++c) strip_.add_to(copies_ + c * kCopyStride + strip_.entry(i + c), i + c);
    }
    for (; i < n; ++i) strip_.add_to(copies_ + strip_.entry(i), i);
  }
  void end_tile() {
    if (++tiles_ == kTilesKept) flush();
  }
  void rescale(double factor) {
    flush();
    for (int64_t i = 0; i < size_; ++i) sums_[i] *= factor;
  }
  void finish(double factor) {
    flush();
    for (int64_t i = 0; i < size_; ++i) {
      total_[i] += factor * sums_[i];
      sums_[i] = 0;
    }
  }

 private:
  using S = typename Arithmetic<T>::Scalar;
  static constexpr int kCopies = 4, kTilesKept = 4;
  static constexpr int kStride = table_stride(F::kTableRows);
  // Numbers from one copy to the next: known when this is compiled, and a cache line more than the largest table takes,
  // so that the copies of an entry do not compete for the same place in the cache.
  static constexpr int kCopyStride = kSmallHistogram * kStride + kLine / sizeof(S);

  void flush() {
    tiles_ = 0;
    for (int c = 0; c < kCopies; ++c) {
      S* copy = copies_ + c * kCopyStride;
      for (int64_t i = 0; i < size_; ++i) sums_[i] += copy[i];
      std::fill_n(copy, size_, S(0));
    }
  }

  double* total_;
  int64_t size_;
  int tiles_ = 0;
  Strip<T, F> strip_;
  alignas(kLine) S copies_[kCopies * kCopyStride];
  double sums_[kSmallHistogram * kStride];
};

// Adds contributions to the total directly. A copy of a large table for each row would cost more than the row.
template <class T, class F>
class LargeHistogram {
 public:
  static constexpr bool kRescales = false;

  LargeHistogram(double* total, int64_t) : total_(total) {}
  void add(const F& f, const typename F::Point& point, T z, T weight, int64_t at) {
    strip_.set(f, point, z, weight, at);
  }
  void add_alone(const F& f, const typename F::Point& point, T z, T weight) {
    add_to_table(f, point, z, weight, total_);
  }
  void end_strip(int64_t n) {
    for (int64_t i = 0; i < n; ++i) strip_.add_to(total_ + strip_.entry(i), i);
  }
  void end_tile() {}
  void finish(double) {}

 private:
  double* total_;
  Strip<T, F> strip_;
};

// Calls visitor(sums) with the sums for a transform F and its table or vector of `size`. NoSums if total is null.
template <class T, class F, class Visitor>
void with_sums(const F&, double* total, int64_t size, Visitor&& visitor) {
  if (total == nullptr) {
    visitor(NoSums());
  } else if constexpr (F::kTableRows == 0) {
    visitor(VectorSums<T, F>(total, size));
  } else if (size <= kSmallHistogram) {
    visitor(SmallHistogram<T, F>(total, size));
  } else {
    visitor(LargeHistogram<T, F>(total, size));
  }
}

}  // namespace
}  // namespace monosoftmax::cpu
