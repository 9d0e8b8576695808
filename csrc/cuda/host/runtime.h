// What the kernels, by way of the other headers, call of the runtime, which runs every CUDA thread as a fiber of its
// own. Nothing is inlined from here that writes what two fibers share: the thread sanitizer would take it for a race of
// the kernel. For the same reason the runtime is compiled without that sanitizer's instrumentation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "vector_types.h"

#define MONOSOFTMAX_HIDDEN __attribute__((visibility("hidden")))

namespace monosoftmax::cuda::host {

using Location = std::source_location;
// The last parameter of what a kernel calls: the place of the call.
#define MONOSOFTMAX_CALLER ::monosoftmax::cuda::host::Location where = ::monosoftmax::cuda::host::Location::current()

// Which sanitizers the build has. A runtime and kernels of different builds do not link.
enum class Build { kPlain, kAddress, kThread };
#if defined(__SANITIZE_THREAD__) || defined(MONOSOFTMAX_CUDA_HOST_THREAD)
inline constexpr Build kBuild = Build::kThread;
#elif defined(__SANITIZE_ADDRESS__)
inline constexpr Build kBuild = Build::kAddress;
#else
inline constexpr Build kBuild = Build::kPlain;
#endif

// What a CUDA thread sees of its place.
struct ThreadIndices {
  uint3 thread, block;
  dim3 block_extent, grid_extent;
  unsigned lane;
};
MONOSOFTMAX_HIDDEN extern const ThreadIndices* current;  // of the thread that runs

// Of the process, which ends when a kernel has a defect, once that has been described.
inline constexpr int kDefectExitCode = 99;

enum class Collective : uint8_t {
  kSync,
  kShuffle,
  kBallot,
  kMatchAny,
  kAdd,
  kMaxSigned,
  kMaxUnsigned,
};
// Waits for the lanes in mask to come here, and returns this lane's part of the result: for kShuffle, the value of the
// lane `source`. Only kSync orders memory.
uint64_t warp_collective(Collective collective, unsigned mask, uint64_t value, unsigned source, Location where);
unsigned active_lanes();  // of this warp: those that have not ended

enum class BlockReduction : uint8_t { kNone, kOr, kAnd, kCount };
int block_barrier(BlockReduction reduction, bool predicate, Location where);

void cluster_barrier(Location where);
unsigned cluster_rank();
unsigned cluster_blocks();
void* shared_of_block(void* mine, unsigned block, Location where);

// An array that a kernel declares in static shared memory: one such object for each declaration and instantiation.
struct SharedArray {
  size_t bytes, alignment;
  const char* name;
  const char* file;
  unsigned line;
};
void* shared_array(const SharedArray& array);
unsigned char* dynamic_shared();

// Asynchronous copies wait in the runtime until next_due_copy() hands them back to their thread, which performs them.
struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, zeros;  // in all; at their end, that are not copied
};
void issue_copy(const AsyncCopy& copy, Location where);
void commit_copies();
bool next_due_copy(size_t groups_left,
                   AsyncCopy* copy);  // of the groups but for the last groups_left; whether there was

// What kernels count of their traffic to and from global memory.
struct Traffic {
  uint64_t bytes_read, bytes_written;
};
MONOSOFTMAX_HIDDEN extern Traffic traffic_so_far;

inline void count_traffic(uint64_t* counter, uint64_t bytes) {
  if constexpr (kBuild == Build::kThread) {
    __atomic_fetch_add(counter, bytes, __ATOMIC_RELAXED);
  } else {
    *counter += bytes;
  }
}

}  // namespace monosoftmax::cuda::host
