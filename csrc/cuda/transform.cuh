// A kernel's transform over T, with its coefficients in the shared memory of the block. Large tables stay in global
// memory.
#pragma once

#include "arguments.h"
#include "arithmetic.cuh"

namespace monosoftmax::cuda {

// The logits that a thread takes through a transform at once. With one, the compiler interleaves as many as it likes.
// For a vector of any length there are four: so one load of a coefficient serves all four.
template <int kTableRows, int kSmallest, int kLargest>
using LogitsOf = Pack<float, (kTableRows == 0 && kSmallest != kLargest) ? 4 : 1>;

// The transform F<T> with a vector of coefficients, and F<T, kSmall> with a table, in shared memory if kSmall.
template <template <class> class F, class T>
struct VectorTransform {
  using Over = F<T>;

  static __device__ Over load(const TransformArguments& arguments, unsigned char* shared) {
    float* to = reinterpret_cast<float*>(shared);
    for (int i = threadIdx.x; i < arguments.size; i += blockDim.x) to[i] = arguments.coefficients[i];
    __syncthreads();
    return Over({to, arguments.size, arguments.constants});
  }
};

template <template <class, bool> class F, class T, bool kSmall>
struct TableTransform {
  using Over = F<T, kSmall>;
  static constexpr int kRows = Over::kTableRows, kStride = table_stride(kRows);

  // Fills an entry of a table for look-ups.
  static __device__ void fill_entry(const TransformArguments& arguments, int64_t entry, float* to) {
    const int64_t piece = entry < arguments.size ? entry : arguments.size - 1;
    MONOSOFTMAX_UNROLL for (int r = 0; r < kRows; ++r) to[r] = arguments.coefficients[r * arguments.size + piece];
    F<float, false>::derive(to, piece, arguments.constants);
  }
  static __device__ Over load(const TransformArguments& arguments, unsigned char* shared) {
    if constexpr (kSmall) {
      float* table = reinterpret_cast<float*>(shared);
      const int64_t entries = Over::entries(arguments.size);
      for (int64_t entry = threadIdx.x; entry < entries; entry += blockDim.x) {
        fill_entry(arguments, entry, table + entry * kStride);
      }
      __syncthreads();
      return Over({table, arguments.size, arguments.constants});
    } else {
      return Over({arguments.table, arguments.size, arguments.constants});
    }
  }
};

// Fills the table for look-ups in global memory.
template <class Transform>
__global__ void fill_table_kernel(TransformArguments arguments, float* table) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; entry < arguments.size;
       entry += step) {
    Transform::fill_entry(arguments, entry, table + entry * Transform::kStride);
  }
}

}  // namespace monosoftmax::cuda
