// A second row beside the row of logits: log p, an upstream gradient, or a target of all classes. Its type is an
// argument of the kernels, since a kernel for each pair of types would take the compiler three times as long.
//
// Hazards: an access is one of 16 bytes where the row lies so, otherwise one for each element. Nothing outside the row
// is read or written.
#pragma once

#include "arguments.h"
#include "memory.cuh"

namespace monosoftmax::cuda {

// A row with its own type and alignment, visited in the layout of the row of logits.
class OtherRow {
 public:
  __device__ OtherRow(const void* rows, ElementType type, int64_t offset)
      : row_(static_cast<unsigned char*>(const_cast<void*>(rows)) + offset * (type == ElementType::kFloat ? 4 : 2)),
        type_(type) {}

  // Loads kCount elements from a column on.
  template <int kCount>
  __device__ __forceinline__ void load(int column, float (&values)[kCount]) const {
    if (type_ == ElementType::kFloat) {
      load_as<float>(column, values);
    } else if (type_ == ElementType::kBFloat16) {
      load_as<BFloat16>(column, values);
    } else {
      load_as<Half>(column, values);
    }
  }
  template <int kCount>
  __device__ __forceinline__ void store(int column, const float (&values)[kCount]) const {
    if (type_ == ElementType::kFloat) {
      store_as<float>(column, values);
    } else if (type_ == ElementType::kBFloat16) {
      store_as<BFloat16>(column, values);
    } else {
      store_as<Half>(column, values);
    }
  }

 private:
  // Whether kCount elements there can be accessed as chunks.
  template <class E, int kCount>
  static __device__ __forceinline__ bool in_chunks(const E* at) {
    return kCount % Chunk<E>::kElements == 0 && reinterpret_cast<uintptr_t>(at) % kChunkBytes == 0;
  }
  template <class E, int kCount>
  __device__ __forceinline__ void load_as(int column, float (&values)[kCount]) const {
    const E* at = reinterpret_cast<const E*>(row_) + column;
    constexpr int kElements = Chunk<E>::kElements;
    if constexpr (kCount % kElements == 0) {
      if (in_chunks<E, kCount>(at)) {
        MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; i += kElements) {
          float part[kElements];
          load_chunk(at + i).unpack(part);
          MONOSOFTMAX_UNROLL for (int j = 0; j < kElements; ++j) values[i + j] = part[j];
        }
        return;
      }
    }
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) values[i] = load_element(at + i);
  }
  template <class E, int kCount>
  __device__ __forceinline__ void store_as(int column, const float (&values)[kCount]) const {
    E* at = reinterpret_cast<E*>(row_) + column;
    constexpr int kElements = Chunk<E>::kElements;
    if constexpr (kCount % kElements == 0) {
      if (in_chunks<E, kCount>(at)) {
        MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; i += kElements) {
          float part[kElements];
          MONOSOFTMAX_UNROLL for (int j = 0; j < kElements; ++j) part[j] = values[i + j];
          store_chunk(at + i, part, true);
        }
        return;
      }
    }
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) store_element(at + i, values[i]);
  }

  unsigned char* row_;
  ElementType type_;
};

}  // namespace monosoftmax::cuda
