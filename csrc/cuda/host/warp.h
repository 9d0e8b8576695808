// Barriers, warp-wide functions and clusters in their CUDA spelling. Each function passes on the place of its call:
// threads that meet must be at the same place, and a defect is reported there.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime.h"

inline constexpr int warpSize = 32;

#define threadIdx (::monosoftmax::cuda::host::current->thread)
#define blockIdx (::monosoftmax::cuda::host::current->block)
#define blockDim (::monosoftmax::cuda::host::current->block_extent)
#define gridDim (::monosoftmax::cuda::host::current->grid_extent)

namespace monosoftmax::cuda::host {

template <class T>
inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source, Location where) {
  return from_bits<T>(warp_collective(Collective::kShuffle, mask, to_bits(value), source, where));
}

inline unsigned first_of_segment(int width) { return current->lane & ~static_cast<unsigned>(width - 1); }
inline unsigned last_of_segment(int width) { return current->lane | static_cast<unsigned>(width - 1); }

}  // namespace monosoftmax::cuda::host

inline void __syncthreads(MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  block_barrier(BlockReduction::kNone, false, where);
}
inline int __syncthreads_or(int predicate, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return block_barrier(BlockReduction::kOr, predicate != 0, where);
}
inline int __syncthreads_and(int predicate, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return block_barrier(BlockReduction::kAnd, predicate != 0, where);
}
inline int __syncthreads_count(int predicate, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return block_barrier(BlockReduction::kCount, predicate != 0, where);
}

inline void __syncwarp(unsigned mask = 0xffffffff, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  warp_collective(Collective::kSync, mask, 0, 0, where);
}

// A source beyond the segment of `width` lanes stands for the lane itself; __shfl_sync takes it modulo the width.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return shuffle(mask, value,
                 first_of_segment(width) | (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)), where);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  const unsigned source = current->lane ^ static_cast<unsigned>(lanes);
  return shuffle(mask, value, source <= last_of_segment(width) ? source : current->lane, where);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return shuffle(mask, value, delta <= last_of_segment(width) - current->lane ? current->lane + delta : current->lane,
                 where);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return shuffle(mask, value, delta <= current->lane - first_of_segment(width) ? current->lane - delta : current->lane,
                 where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return static_cast<unsigned>(warp_collective(Collective::kBallot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, MONOSOFTMAX_CALLER) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MONOSOFTMAX_CALLER) {
  return __ballot_sync(mask, predicate, where) == mask;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return static_cast<unsigned>(warp_collective(Collective::kMatchAny, mask, to_bits(value), 0, where));
}
inline unsigned __activemask() { return monosoftmax::cuda::host::active_lanes(); }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return static_cast<unsigned>(warp_collective(Collective::kAdd, mask, value, 0, where));
}
inline int __reduce_add_sync(unsigned mask, int value, MONOSOFTMAX_CALLER) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value), where));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  return static_cast<unsigned>(warp_collective(Collective::kMaxUnsigned, mask, value, 0, where));
}
inline int __reduce_max_sync(unsigned mask, int value, MONOSOFTMAX_CALLER) {
  using namespace monosoftmax::cuda::host;
  const auto bits = static_cast<unsigned>(value);
  return static_cast<int>(static_cast<unsigned>(warp_collective(Collective::kMaxSigned, mask, bits, 0, where)));
}

namespace monosoftmax::cuda {

class Cluster {
 public:
  static unsigned rank() { return host::cluster_rank(); }
  static unsigned blocks() { return host::cluster_blocks(); }
  static void sync(MONOSOFTMAX_CALLER) { host::cluster_barrier(where); }
  template <class T>
  static T* of_block(T* mine, unsigned block, MONOSOFTMAX_CALLER) {
    return static_cast<T*>(
        host::shared_of_block(const_cast<void*>(static_cast<const volatile void*>(mine)), block, where));
  }
};

}  // namespace monosoftmax::cuda
