// Rows of logits in memory, 16 bytes at a time.
//
// A row may begin anywhere. It is divided into a head of less than 16 bytes, chunks of 16 bytes at multiples of 16, and
// a tail. The elements of head, tail and the chunk with the target are edges. There are fewer edges than lanes of a
// warp: each thread of the first warp takes one at most. Nothing outside a row is read or written.
#pragma once

#include <cstring>

#include "arithmetic.cuh"

namespace monosoftmax::cuda {

constexpr int kChunkBytes = 16;

using BFloat16 = __nv_bfloat16;
using Half = __half;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The differences between the types of logits. A register holds one E of 32 bits, or two of 16 bits.
template <class E>
struct Element;

template <>
struct Element<float> {
  static constexpr int kInRegister = 1;
  // Gradients and a largest logit are computed as if smaller logits had this value. The probability is 0, as for -inf.
  // But z is finite, so that 0 times z, in the gradients of the coefficients, is 0 and not NaN.
  static constexpr unsigned kLowest = 0xF149F2CA;  // -1e30

  static __device__ __forceinline__ void unpack(unsigned bits, float* out) { out[0] = __uint_as_float(bits); }
  static __device__ __forceinline__ unsigned pack(const float* in) { return __float_as_uint(in[0]); }
  // The larger of a and b, for each element; if one is NaN, the other.
  static __device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};

template <>
struct Element<BFloat16> {
  static constexpr int kInRegister = 2;
  static constexpr unsigned kLowest = 0xF149F149;

  static __device__ __forceinline__ void unpack(unsigned bits, float* out) {
    out[0] = __uint_as_float(bits << 16);
    out[1] = __uint_as_float(bits & 0xFFFF0000u);
  }
  static __device__ __forceinline__ unsigned pack(const float* in) {
    return bits_as<unsigned>(__floats2bfloat162_rn(in[0], in[1]));
  }
  static __device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
    return bits_as<unsigned>(__hmax2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
  static __device__ __forceinline__ float widen(BFloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ BFloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

template <>
struct Element<Half> {
  static constexpr int kInRegister = 2;
  static constexpr unsigned kLowest = 0xFBFFFBFF;  // -65504, the lowest finite number

  static __device__ __forceinline__ void unpack(unsigned bits, float* out) {
    const float2 pair = __half22float2(bits_as<__half2>(bits));
    out[0] = pair.x;
    out[1] = pair.y;
  }
  static __device__ __forceinline__ unsigned pack(const float* in) {
    return bits_as<unsigned>(__floats2half2_rn(in[0], in[1]));
  }
  static __device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
    return bits_as<unsigned>(__hmax2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
  static __device__ __forceinline__ float widen(Half x) { return __half2float(x); }
  static __device__ __forceinline__ Half narrow(float x) { return __float2half_rn(x); }
};

// 16 bytes of elements.
template <class E>
struct Chunk {
  static constexpr int kElements = kChunkBytes / sizeof(E);

  uint4 bits;

  static __device__ __forceinline__ Chunk lowest() {
    constexpr unsigned bits = Element<E>::kLowest;
    return {{bits, bits, bits, bits}};
  }
  __device__ __forceinline__ Chunk larger(const Chunk& other) const {
    using A = Element<E>;
    return {{A::larger(bits.x, other.bits.x), A::larger(bits.y, other.bits.y), A::larger(bits.z, other.bits.z),
             A::larger(bits.w, other.bits.w)}};
  }
  __device__ __forceinline__ void unpack(float (&out)[kElements]) const {
    constexpr int kStep = Element<E>::kInRegister;
    Element<E>::unpack(bits.x, out);
    Element<E>::unpack(bits.y, out + kStep);
    Element<E>::unpack(bits.z, out + 2 * kStep);
    Element<E>::unpack(bits.w, out + 3 * kStep);
  }
  static __device__ __forceinline__ Chunk pack(const float (&in)[kElements]) {
    constexpr int kStep = Element<E>::kInRegister;
    using A = Element<E>;
    return {{A::pack(in), A::pack(in + kStep), A::pack(in + 2 * kStep), A::pack(in + 3 * kStep)}};
  }
};

template <class E>
__device__ __forceinline__ float lowest_logit() {
  float numbers[2];
  Element<E>::unpack(Element<E>::kLowest, numbers);
  return numbers[0];
}

// Divides a row of `classes` elements. The chunk with the target, if there is one, does not count as a chunk: its
// elements are edges. So the loop over chunks needs no code for the target.
template <class E>
class RowLayout {
 public:
  static constexpr int kElements = Chunk<E>::kElements;

  // target: its column, or -1. Without in_chunks, all elements of the row are edges.
  __device__ __forceinline__ RowLayout(const E* row, int classes, int target, bool in_chunks = true)
      : classes_(classes) {
    const auto beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(row)) % kChunkBytes;
    head_ = in_chunks ? min(classes, static_cast<int>((kChunkBytes - beyond) % kChunkBytes / sizeof(E))) : classes;
    ends_ = (classes - head_) / kElements * kElements + head_;
    left_out_ = target >= head_ && target < ends_ ? (target - head_) / kElements : ends_;
    chunks_ = (ends_ - head_) / kElements - (left_out_ == ends_ ? 0 : 1);
  }
  __device__ __forceinline__ int chunks() const { return chunks_; }
  __device__ __forceinline__ int edges() const { return classes_ - chunks_ * kElements; }
  // The first column of a chunk.
  __device__ __forceinline__ int column_of_chunk(int chunk) const {
    return head_ + (chunk < left_out_ ? chunk : chunk + 1) * kElements;
  }
  // The column of an edge: of the head, the tail, or the chunk left out.
  __device__ __forceinline__ int column_of_edge(int edge) const {
    if (edge < head_) return edge;
    const int tail = classes_ - ends_;
    if (edge < head_ + tail) return ends_ + (edge - head_);
    return head_ + left_out_ * kElements + (edge - head_ - tail);
  }

 private:
  int classes_, head_, ends_, left_out_, chunks_;
};

template <class E>
__device__ __forceinline__ Chunk<E> load_chunk(const E* from) {
  MONOSOFTMAX_GLOBAL_READ(kChunkBytes);
  return {*reinterpret_cast<const uint4*>(from)};
}
// Copies a chunk, asynchronously if the GPU can. After wait_for_copies(), the copy is visible to the thread that called
// both functions.
template <class E>
__device__ __forceinline__ void copy_chunk(Chunk<E>* shared, const E* from) {
  MONOSOFTMAX_GLOBAL_READ(kChunkBytes);
  __pipeline_memcpy_async(shared, from, kChunkBytes);
}
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}
template <class E>
__device__ __forceinline__ float load_element(const E* from) {
  MONOSOFTMAX_GLOBAL_READ(sizeof(E));
  return Element<E>::widen(*from);
}
template <class E>
__device__ __forceinline__ void store_element(E* to, float x) {
  MONOSOFTMAX_GLOBAL_WRITE(sizeof(E));
  *to = Element<E>::narrow(x);
}

// Whether two rows begin equally far from a multiple of 16 bytes, so that they have the same chunks.
template <class E>
__device__ __forceinline__ bool equally_aligned(const E* a, const E* b) {
  return ((reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) & (kChunkBytes - 1)) == 0;
}

// Writes the elements of a chunk, one by one unless their place is a multiple of 16 bytes.
template <class E>
__device__ __forceinline__ void store_chunk(E* to, const float (&values)[Chunk<E>::kElements], bool aligned) {
  MONOSOFTMAX_GLOBAL_WRITE(kChunkBytes);
  if (aligned) {
    *reinterpret_cast<uint4*>(to) = Chunk<E>::pack(values).bits;
  } else {
    MONOSOFTMAX_UNROLL for (int i = 0; i < Chunk<E>::kElements; ++i) to[i] = Element<E>::narrow(values[i]);
  }
}

}  // namespace monosoftmax::cuda
