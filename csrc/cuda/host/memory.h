// Shared memory, atomic operations, loads and stores with a cache hint, and asynchronous copies, in their CUDA
// spelling.
#pragma once

#include <concepts>
#include <cstring>
#include <type_traits>

#include "runtime.h"

// The array is aligned for its type and no further: to read an array of floats as float4 is a defect on a GPU, too.
#define SHARED_ARRAY(T, name, ...)                                                                                  \
  static constexpr ::monosoftmax::cuda::host::SharedArray name##_declared{sizeof(T __VA_ARGS__), alignof(T), #name, \
                                                                          __FILE__, __LINE__};                      \
  auto& name =                                                                                                      \
      *static_cast<std::type_identity_t<T __VA_ARGS__>*>(::monosoftmax::cuda::host::shared_array(name##_declared))
#define DYNAMIC_SHARED(name) unsigned char* name = ::monosoftmax::cuda::host::dynamic_shared()

#define MONOSOFTMAX_GLOBAL_READ(bytes) \
  ::monosoftmax::cuda::host::count_traffic(&::monosoftmax::cuda::host::traffic_so_far.bytes_read, bytes)
#define MONOSOFTMAX_GLOBAL_WRITE(bytes) \
  ::monosoftmax::cuda::host::count_traffic(&::monosoftmax::cuda::host::traffic_so_far.bytes_written, bytes)

template <class T>
__attribute__((always_inline)) inline T __ldg(const T* from) {
  return *from;
}
template <class T>
__attribute__((always_inline)) inline T __ldcg(const T* from) {
  return *from;
}
template <class T>
__attribute__((always_inline)) inline T __ldcs(const T* from) {
  return *from;
}
template <class T>
__attribute__((always_inline)) inline void __stcg(T* to, std::type_identity_t<T> value) {
  *to = value;
}
template <class T>
__attribute__((always_inline)) inline void __stcs(T* to, std::type_identity_t<T> value) {
  *to = value;
}

// All CUDA threads run in the same thread of the process, so only the compiler might reorder accesses.
inline void __threadfence_block() { asm volatile("" ::: "memory"); }
inline void __threadfence() { asm volatile("" ::: "memory"); }

namespace monosoftmax::cuda::host {

template <class T, class... Types>
concept one_of = (std::same_as<T, Types> || ...);

// Relaxed, as on a GPU: an atomic operation orders nothing but itself.
template <class T, class Function>
__attribute__((always_inline)) inline T atomic_update(T* at, Function function) {
  T old, updated;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  do {
    updated = function(old);
  } while (!__atomic_compare_exchange(at, &old, &updated, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace monosoftmax::cuda::host

template <monosoftmax::cuda::host::one_of<int, unsigned, unsigned long long, float, double> T>
__attribute__((always_inline)) inline T atomicAdd(T* at, std::type_identity_t<T> value) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
  } else {
    return monosoftmax::cuda::host::atomic_update(at, [value](T old) { return old + value; });
  }
}
template <monosoftmax::cuda::host::one_of<int, unsigned, long long, unsigned long long> T>
__attribute__((always_inline)) inline T atomicMax(T* at, std::type_identity_t<T> value) {
  return monosoftmax::cuda::host::atomic_update(at, [value](T old) { return old > value ? old : value; });
}
template <monosoftmax::cuda::host::one_of<int, unsigned, long long, unsigned long long> T>
__attribute__((always_inline)) inline T atomicMin(T* at, std::type_identity_t<T> value) {
  return monosoftmax::cuda::host::atomic_update(at, [value](T old) { return old < value ? old : value; });
}
template <monosoftmax::cuda::host::one_of<int, unsigned, unsigned long long, float> T>
__attribute__((always_inline)) inline T atomicExch(T* at, std::type_identity_t<T> value) {
  return monosoftmax::cuda::host::atomic_update(at, [value](T) { return value; });
}
template <monosoftmax::cuda::host::one_of<int, unsigned, unsigned long long, unsigned short> T>
__attribute__((always_inline)) inline T atomicCAS(T* at, std::type_identity_t<T> wanted,
                                                  std::type_identity_t<T> value) {
  __atomic_compare_exchange(at, &wanted, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return wanted;
}

namespace monosoftmax::cuda::host {

template <size_t bytes>
__attribute__((always_inline)) inline void copy_aligned(void* to, const void* from) {
  std::memcpy(__builtin_assume_aligned(to, bytes), __builtin_assume_aligned(from, bytes), bytes);
}

// Inlined into the kernel, so that the sanitizers see accesses of the waiting thread.
__attribute__((always_inline)) inline void perform(const AsyncCopy& copy) {
  if (copy.zeros != 0) {
    const unsigned copied = copy.bytes - copy.zeros;
    for (unsigned i = 0; i < copy.bytes; ++i) {
      static_cast<char*>(copy.to)[i] = i < copied ? static_cast<const char*>(copy.from)[i] : '\0';
    }
    return;
  }
  switch (copy.bytes) {
    case 4: return copy_aligned<4>(copy.to, copy.from);
    case 8: return copy_aligned<8>(copy.to, copy.from);
    default: return copy_aligned<16>(copy.to, copy.from);
  }
}

}  // namespace monosoftmax::cuda::host

// The copy happens as late as CUDA allows, in the __pipeline_wait_prior() that waits for it.
__attribute__((always_inline)) inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes,
                                                                   size_t zeros = 0, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  issue_copy({to, from, static_cast<unsigned>(bytes), static_cast<unsigned>(zeros)}, where);
  if constexpr (kBuild == Build::kAddress) {  // a bad address is reported here, rather than at the wait
    const size_t copied = bytes - zeros;
    (void)*(static_cast<const volatile char*>(to) + bytes - 1);
    if (copied > 0) (void)*(static_cast<const volatile char*>(from) + copied - 1);
  }
}
inline void __pipeline_commit() { monosoftmax::cuda::host::commit_copies(); }
__attribute__((always_inline)) inline void __pipeline_wait_prior(size_t groups_left) {
  using namespace monosoftmax::cuda::host;
  AsyncCopy copy;
  while (next_due_copy(groups_left, &copy)) perform(copy);
}
