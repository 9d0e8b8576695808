// The CUDA sources are compiled by nvcc, or by a C++20 compiler with the stand-in host/shim.h, which runs the same
// kernels on the CPU. Both have the names of CUDA. This file adds names for operations without a common spelling:
//
//   SHARED_ARRAY(T, name, [N])   a static array in shared memory
//   DYNAMIC_SHARED(name)         the dynamic shared memory of the launch: unsigned char*, aligned to 16 bytes
//   MONOSOFTMAX_GLOBAL_READ(bytes), MONOSOFTMAX_GLOBAL_WRITE(bytes)
//                                the bytes that the calling thread reads or writes of rows in global memory. Only the
//                                host counts them.
//   exp2_approximate, log2_approximate, reciprocal_approximate
//                                one instruction each, which flushes subnormals. On the host they are exact to
//                                rounding.
//   opaque(i)                    i, of which the compiler knows nothing more
//   SharedBytes                  the shared memory from an address on, by offsets in bytes. load() is for memory that
//                                no thread writes meanwhile; load_again() and store() keep their order.
//   Cluster                      the blocks that share one row; one block if there are no clusters (before sm_90)
#pragma once

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <type_traits>

#define SHARED_ARRAY(T, name, ...) __shared__ T name __VA_ARGS__
#define DYNAMIC_SHARED(name)                                      \
  extern __shared__ __align__(16) unsigned char name##_storage[]; \
  unsigned char* name = name##_storage
#define MONOSOFTMAX_GLOBAL_READ(bytes)
#define MONOSOFTMAX_GLOBAL_WRITE(bytes)
#define MONOSOFTMAX_UNROLL _Pragma("unroll")
#define MONOSOFTMAX_NO_UNROLL _Pragma("unroll 1")
#define MONOSOFTMAX_UNROLL_4 _Pragma("unroll 4")

namespace monosoftmax::cuda {

__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float log2_approximate(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ int opaque(int i) {
  asm volatile("" : "+r"(i));
  return i;
}

class SharedBytes {
 public:
  explicit __device__ SharedBytes(const void* first)
      : address_(static_cast<unsigned>(__cvta_generic_to_shared(first))) {}
  template <class T>
  __device__ __forceinline__ T load(unsigned offset) const {
    T result;
    load(address_ + offset, result);
    return result;
  }
  template <class T>
  __device__ __forceinline__ T load_again(unsigned offset) const {
    static_assert(std::is_same_v<T, float2>);
    T x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address_ + offset));
    return x;
  }
  __device__ __forceinline__ void store(unsigned offset, float2 x) const {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address_ + offset), "f"(x.x), "f"(x.y));
  }

 private:
  static __device__ __forceinline__ void load(unsigned address, float& x) {
    asm("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
  }
  static __device__ __forceinline__ void load(unsigned address, float2& x) {
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
  }
  static __device__ __forceinline__ void load(unsigned address, float4& x) {
    asm("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address));
  }

  unsigned address_;
};

class Cluster {
 public:
  __device__ static unsigned rank() {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().block_rank();
#else
    return 0;
#endif
  }
  __device__ static unsigned blocks() {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().num_blocks();
#else
    return 1;
#endif
  }
  // A barrier for all threads of all blocks. After it, every thread sees all earlier writes to shared memory.
  __device__ static void sync() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }
  // The address in the shared memory of another block that corresponds to `mine` in this block.
  template <class T>
  __device__ static T* of_block(T* mine, unsigned block) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(mine, block);
#else
    return mine;
#endif
  }
};

}  // namespace monosoftmax::cuda

#else

#include <cstring>

#include "host/shim.h"

#define MONOSOFTMAX_UNROLL_4

namespace monosoftmax::cuda {

inline int opaque(int i) { return i; }

class SharedBytes {
 public:
  explicit SharedBytes(const void* first)
      : first_(const_cast<unsigned char*>(static_cast<const unsigned char*>(first))) {}
  template <class T>
  T load(unsigned offset) const {
    return *reinterpret_cast<const T*>(first_ + offset);
  }
  template <class T>
  T load_again(unsigned offset) const {
    return load<T>(offset);
  }
  void store(unsigned offset, float2 x) const { *reinterpret_cast<float2*>(first_ + offset) = x; }

 private:
  unsigned char* first_;
};

}  // namespace monosoftmax::cuda

#endif
