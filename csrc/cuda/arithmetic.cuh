// The arithmetic of the transforms on floats of a GPU. A thread takes W logits at a time.
//
// ex2, lg2 and rcp of the special function unit take one instruction each, have an error of 2 ulp, and flush subnormal
// numbers to 0. The rounding of their argument counts more: exp(x) has the error of x log2(e), 6e-8 |x|. The sources
// are compiled without contraction of a * b + c, so that every kernel rounds f(z) in the same way. An fma is written
// as fma.
#pragma once

#include "../transforms/arithmetic.h"
#include "platform.h"

namespace monosoftmax {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// W numbers in registers.
template <class S, int W>
struct Pack {
  static constexpr int kWidth = W;

  S of[W];

  Pack() = default;
  explicit MONOSOFTMAX_HD Pack(S x) { MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) of[i] = x; }
};

using Float = Pack<float, 1>;

template <class R, class S, int W, class Function>
MONOSOFTMAX_HD Pack<R, W> each(const Pack<S, W>& x, Function&& function) {
  Pack<R, W> result;
  MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) result.of[i] = function(x.of[i]);
  return result;
}
template <class R, class S, int W, class Function>
MONOSOFTMAX_HD Pack<R, W> each(const Pack<S, W>& x, const Pack<S, W>& y, Function&& function) {
  Pack<R, W> result;
  MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) result.of[i] = function(x.of[i], y.of[i]);
  return result;
}

template <int W>
__device__ __forceinline__ Pack<float, W> operator+(const Pack<float, W>& x, const Pack<float, W>& y) {
  return each<float>(x, y, [](float a, float b) { return a + b; });
}
template <int W>
__device__ __forceinline__ Pack<float, W> operator-(const Pack<float, W>& x, const Pack<float, W>& y) {
  return each<float>(x, y, [](float a, float b) { return a - b; });
}
template <int W>
__device__ __forceinline__ Pack<float, W> operator*(const Pack<float, W>& x, const Pack<float, W>& y) {
  return each<float>(x, y, [](float a, float b) { return a * b; });
}
// For |y| below 2^126.
template <int W>
__device__ __forceinline__ Pack<float, W> operator/(const Pack<float, W>& x, const Pack<float, W>& y) {
  return each<float>(x, y, [](float a, float b) { return a * reciprocal_approximate(b); });
}

// A whole number n from 0 to 2^22 is in the last bits of the float 2 + n 2^-22. So it takes one addition and no
// conversion. These bits times the bytes of a table entry, 4, 8 or any multiple of 4, are an offset: the first bits,
// 2^30, vanish from the 32 bits of the product.
constexpr float kNumberBase = 2, kNumberStep = 1.0f / (1 << 22);
constexpr unsigned kNumberBits = 0x40000000;

// The argument of a look-up: the bits of a table entry, and its number as a float, for formulas. If one of them is not
// used, it costs nothing.
template <int W>
struct PackPiece {
  Pack<unsigned, W> bits;
  Pack<float, W> number;
};

// 4 GiB of global memory, from an address on.
class GlobalBytes {
 public:
  explicit __device__ GlobalBytes(const void* first) : first_(static_cast<const unsigned char*>(first)) {}
  template <class T>
  __device__ __forceinline__ T load(unsigned offset) const {
    return *reinterpret_cast<const T*>(first_ + offset);
  }

 private:
  const unsigned char* first_;
};

// Look-ups in a table of [entries, table_stride(kRows)], 8 or 16 bytes at a time. The table is in shared memory if
// kSmall, otherwise in global memory.
template <int W, int kRows, bool kSmall>
class DeviceTable {
 public:
  using T = Pack<float, W>;
  struct Row {
    T of[kRows];
  };

  __device__ DeviceTable(const float* data, int64_t) : data_(data) {}
  __device__ __forceinline__ T at(int row, const PackPiece<W>& piece) const {
    return each<float>(piece.bits, [&](unsigned bits) {
      return data_.template load<float>(bits * kEntryBytes + row * static_cast<unsigned>(sizeof(float)));
    });
  }
  __device__ __forceinline__ Row row(const PackPiece<W>& piece) const {
    Row result;
    MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) {
      if constexpr (kRows == 2) {
        const float2 pair = data_.template load<float2>(piece.bits.of[i] * kEntryBytes);
        result.of[0].of[i] = pair.x;
        result.of[1].of[i] = pair.y;
      } else {
        static_assert(kRows % 4 == 0, "rows of 2 or 4 n numbers");
        MONOSOFTMAX_UNROLL for (int r = 0; r < kRows; r += 4) {
          const float4 part = data_.template load<float4>(piece.bits.of[i] * kEntryBytes + r * 4);
          result.of[r].of[i] = part.x;
          result.of[r + 1].of[i] = part.y;
          result.of[r + 2].of[i] = part.z;
          result.of[r + 3].of[i] = part.w;
        }
      }
    }
    return result;
  }

 private:
  static constexpr unsigned kEntryBytes = 4 * table_stride(kRows);

  std::conditional_t<kSmall, SharedBytes, GlobalBytes> data_;
};

}  // namespace cuda

template <int W>
struct Arithmetic<cuda::Pack<float, W>> {
  using T = cuda::Pack<float, W>;
  using Scalar = float;
  using Mask = cuda::Pack<bool, W>;
  using Piece = cuda::PackPiece<W>;
  template <int kRows, bool kSmall>
  using Table = cuda::DeviceTable<W, kRows, kSmall>;
  static constexpr int64_t small_table(int) { return 0; }
  static constexpr bool kPointsKeep = false;

  static __device__ __forceinline__ T exp(T x) {
    return cuda::each<float>(x, [](float a) { return cuda::exp2_approximate(a * cuda::kLog2E); });
  }
  static __device__ __forceinline__ T decay(T x) {
    return cuda::each<float>(x, [](float a) { return cuda::exp2_approximate(fabsf(a) * -cuda::kLog2E); });
  }
  // The absolute error is 2e-7, from the rounding of 1 + x.
  static __device__ __forceinline__ T log1p(T x) {
    return cuda::each<float>(x, [](float a) { return cuda::log2_approximate(1.0f + a) * cuda::kLn2; });
  }
  static __device__ __forceinline__ T tanh(T x, T& slope) {
    T result;
    MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) result.of[i] = tanh_of(x.of[i], slope.of[i]);
    return result;
  }
  static __device__ __forceinline__ T abs(T x) {
    return cuda::each<float>(x, [](float a) { return fabsf(a); });
  }
  static __device__ __forceinline__ T floor(T x) {
    return cuda::each<float>(x, [](float a) { return floorf(a); });
  }
  static __device__ __forceinline__ T fma(T a, T b, T c) {
    T result;
    MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) result.of[i] = __fmaf_rn(a.of[i], b.of[i], c.of[i]);
    return result;
  }
  static __device__ __forceinline__ Mask less(T a, T b) {
    return cuda::each<bool>(a, b, [](float x, float y) { return x < y; });
  }
  static __device__ __forceinline__ Mask less_equal(T a, T b) {
    return cuda::each<bool>(a, b, [](float x, float y) { return x <= y; });
  }
  static __device__ __forceinline__ T select(Mask mask, T a, T b) {
    T result;
    MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) result.of[i] = mask.of[i] ? a.of[i] : b.of[i];
    return result;
  }
  static __device__ __forceinline__ Piece piece(T number) {
    return {cuda::each<unsigned>(
                number, [](float a) { return __float_as_uint(__fmaf_rn(a, cuda::kNumberStep, cuda::kNumberBase)); }),
            number};
  }
  static __device__ __forceinline__ T number(const Piece& piece) { return piece.number; }

 private:
  static __device__ __forceinline__ float tanh_of(float x, float& slope) {
    const float decay = cuda::exp2_approximate(fabsf(x) * (-2 * cuda::kLog2E));
    const float complement = 2 * decay * cuda::reciprocal_approximate(1 + decay);  // 1 - |tanh(x)|
    const float size = 1 - complement, square = x * x;
    slope = complement * (1 + size);
    // Next to 0 the difference cancels, so the series replaces it, with enough terms for float.
    float series = __fmaf_rn(square, 62.0f / 2835, -17.0f / 315);
    series = __fmaf_rn(square, series, 2.0f / 15);
    series = __fmaf_rn(square, series, -1.0f / 3);
    return square < 0.0625f ? __fmaf_rn(x * square, series, x) : copysignf(size, x);
  }
};

// Finds a piece in 3 instructions; floor, two comparisons and a conversion would be 6. The offset is divided by the
// width of 2^n pieces, with 2^n >= count, in a multiplication that also clamps its result to [0, 1] at no cost. Then an
// fma, rounded down, has the piece in its last bits. So the piece is clamped to 2^n: a table repeats its last entry.
template <int W>
class UniformPieces<cuda::Pack<float, W>, true> {
 public:
  using T = cuda::Pack<float, W>;

  __device__ UniformPieces(float inverse_width, int64_t count)
      : scale_((entries(count) - 1) * cuda::kNumberStep),
        step_(inverse_width / static_cast<float>(entries(count) - 1)),
        last_(count - 1) {}
  __device__ __forceinline__ cuda::PackPiece<W> operator()(T offset) const {
    cuda::PackPiece<W> piece;
    MONOSOFTMAX_UNROLL for (int i = 0; i < W; ++i) {
      const float part = __saturatef(offset.of[i] * step_);
      const float number = __fmaf_rd(part, scale_, cuda::kNumberBase);
      piece.bits.of[i] = __float_as_uint(number);
      piece.number.of[i] =
          fminf(__fmaf_rn(number, 1 / cuda::kNumberStep, -cuda::kNumberBase / cuda::kNumberStep), last_);
    }
    return piece;
  }
  static constexpr int64_t entries(int64_t count) { return padded_entries(count); }

 private:
  float scale_, step_, last_;
};

}  // namespace monosoftmax
