// Looks up the coefficients of pieces, for a vector of pieces at a time. A small table lies in registers, and a look-up
// is a permutation. A large table lies in memory, and all coefficients of a piece are loaded together.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "../transforms/arithmetic.h"

namespace monosoftmax::cpu {
// Each instruction set needs its own names: if two files define the same name, the linker keeps only one definition.
inline namespace CPU_CAPABILITY {

// The most pieces of a table in registers; 0 if the instruction set has no such permutation.
template <class S>
constexpr int64_t small_table([[maybe_unused]] int rows) {
#if defined(CPU_CAPABILITY_AVX512)
  if (std::is_same_v<S, float>) return rows <= 2 ? 64 : 16;
#elif defined(CPU_CAPABILITY_AVX2)
  if (std::is_same_v<S, float>) return 16;
#endif
  return 0;
}

template <class S, int kRows, bool kSmall>
class PieceTable {
 public:
  using T = at::vec::Vectorized<S>;
  struct Row {
    T of[kRows];
  };

  PieceTable(const S* data, int64_t) : data_(data) {}
  // One coefficient of each piece.
  T at(int row, T piece) const { return gather(row, index_of(piece)); }
  // All coefficients of each piece.
  Row row(T piece) const {
    const auto index = index_of(piece);
    Row result;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    if constexpr (kRows == 2 && std::is_same_v<S, float>) {
      load_pairs(index, result);
      return result;
    }
#endif
    for (int r = 0; r < kRows; ++r) result.of[r] = gather(r, index);
    return result;
  }

 private:
  static constexpr int kStride = table_stride(kRows);

  static auto index_of(T piece) { return at::vec::convert_to_int_of_same_size(piece); }
  template <class Index>
  T gather(int row, Index index) const {
    return at::vec::gather<sizeof(S)>(data_ + row, index * Index(kStride));
  }
#if defined(CPU_CAPABILITY_AVX512)
  void load_pairs(__m512i index, Row& result) const {
    const auto* pairs = reinterpret_cast<const double*>(data_);
    const __m512 a = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_castsi512_si256(index), pairs, 8));
    const __m512 b = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_extracti64x4_epi64(index, 1), pairs, 8));
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    result.of[0] = _mm512_permutex2var_ps(a, even, b);
    result.of[1] = _mm512_permutex2var_ps(a, odd, b);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  // Eight loads of a pair: a gather of 32 or 64 bits takes twice as long (Zen 3, Zen 4).
  void load_pairs(__m256i index, Row& result) const {
    const __m128i low = _mm256_castsi256_si128(index), high = _mm256_extracti128_si256(index, 1);
    const __m256 a = _mm256_set_m128(two_pairs(_mm_cvtsi128_si64(high)), two_pairs(_mm_cvtsi128_si64(low)));
    const __m256 b = _mm256_set_m128(two_pairs(_mm_extract_epi64(high, 1)), two_pairs(_mm_extract_epi64(low, 1)));
    result.of[0] = _mm256_shuffle_ps(a, b, 0x88);
    result.of[1] = _mm256_shuffle_ps(a, b, 0xDD);
  }
  __m128 two_pairs(int64_t indices) const {
    const auto* pairs = reinterpret_cast<const double*>(data_);
    return _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(pairs + static_cast<uint32_t>(indices)), pairs + (indices >> 32)));
  }
#endif

  const S* data_;
};

#if defined(CPU_CAPABILITY_AVX512)

template <int kRows>
class PieceTable<float, kRows, true> {
 public:
  using T = at::vec::Vectorized<float>;
  struct Row {
    T of[kRows];
  };

  PieceTable(const float* data, int64_t pieces) {
    for (int r = 0; r < kRows; ++r) {
      alignas(64) float lanes[16 * kVectors] = {};
      for (int64_t k = 0; k < pieces; ++k) lanes[k] = data[k * table_stride(kRows) + r];
      for (int v = 0; v < kVectors; ++v) rows_[r][v] = _mm512_load_ps(lanes + 16 * v);
    }
  }
  T at(int row, T piece) const { return get(row, _mm512_cvttps_epi32(piece)); }
  Row row(T piece) const {
    const __m512i index = _mm512_cvttps_epi32(piece);
    Row result;
    for (int r = 0; r < kRows; ++r) result.of[r] = get(r, index);
    return result;
  }

 private:
  static constexpr int kVectors = static_cast<int>(small_table<float>(kRows)) / 16;

  T get(int row, __m512i index) const {
    const __m512(&v)[kVectors] = rows_[row];
    if constexpr (kVectors == 1) {
      return _mm512_permutexvar_ps(index, v[0]);
    } else {
      const __m512 low = _mm512_permutex2var_ps(v[0], index, v[1]);
      const __m512 high = _mm512_permutex2var_ps(v[2], index, v[3]);
      return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
    }
  }

  __m512 rows_[kRows][kVectors];
};

#elif defined(CPU_CAPABILITY_AVX2)

template <int kRows>
class PieceTable<float, kRows, true> {
 public:
  using T = at::vec::Vectorized<float>;
  struct Row {
    T of[kRows];
  };

  PieceTable(const float* data, int64_t pieces) {
    for (int r = 0; r < kRows; ++r) {
      alignas(32) float lanes[16] = {};
      for (int64_t k = 0; k < pieces; ++k) lanes[k] = data[k * table_stride(kRows) + r];
      for (int v = 0; v < 2; ++v) rows_[r][v] = _mm256_load_ps(lanes + 8 * v);
    }
  }
  T at(int row, T piece) const { return get(row, _mm256_cvttps_epi32(piece)); }
  Row row(T piece) const {
    const __m256i index = _mm256_cvttps_epi32(piece);
    Row result;
    for (int r = 0; r < kRows; ++r) result.of[r] = get(r, index);
    return result;
  }

 private:
  T get(int row, __m256i index) const {
    const __m256 low = _mm256_permutevar8x32_ps(rows_[row][0], index);
    const __m256 high = _mm256_permutevar8x32_ps(rows_[row][1], index);
    // A blend chooses by the sign bit, so bit 3 of the index is moved there.
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }

  __m256 rows_[kRows][2];
};

#endif

}  // namespace CPU_CAPABILITY
}  // namespace monosoftmax::cpu
