// The functions of the runtime that kernels call, through the other headers. The runtime runs every CUDA thread as its
// own fiber. Functions that write memory shared by two fibers are never inlined: the thread sanitizer would report a
// race of the kernel. For the same reason the runtime is compiled without the instrumentation of this sanitizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "vector_types.h"

#define MONOSOFTMAX_HIDDEN __attribute__((visibility("hidden")))

namespace monosoftmax::cuda::host {

using Location = std::source_location;
// The last parameter of the functions that a kernel calls: the place of the call.
#define MONOSOFTMAX_CALLER ::monosoftmax::cuda::host::Location where = ::monosoftmax::cuda::host::Location::current()

// The sanitizers of the build. A runtime and kernels of different builds do not link.
enum class Build { kPlain, kAddress, kThread };
#if defined(__SANITIZE_THREAD__) || defined(MONOSOFTMAX_CUDA_HOST_THREAD)
inline constexpr Build kBuild = Build::kThread;
#elif defined(__SANITIZE_ADDRESS__)
inline constexpr Build kBuild = Build::kAddress;
#else
inline constexpr Build kBuild = Build::kPlain;
#endif

// The indices that a CUDA thread can read.
struct ThreadIndices {
  uint3 thread, block;
  dim3 block_extent, grid_extent;
  unsigned lane;
};
MONOSOFTMAX_HIDDEN extern const ThreadIndices* current;  // of the running thread

// The exit code of the process if a kernel has a defect: the process describes the defect, then ends.
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
unsigned active_lanes();  // the lanes of this warp that have not ended

enum class BlockReduction : uint8_t { kNone, kOr, kAnd, kCount };
int block_barrier(BlockReduction reduction, bool predicate, Location where);

void cluster_barrier(Location where);
unsigned cluster_rank();
unsigned cluster_blocks();
void* shared_of_block(void* mine, unsigned block, Location where);

// An array in the static shared memory of a kernel: one such object for each declaration and instantiation.
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
  unsigned bytes, zeros;  // all bytes; the bytes at their end that are not copied
};
void issue_copy(const AsyncCopy& copy, Location where);
void commit_copies();
bool next_due_copy(size_t groups_left,
                   AsyncCopy* copy);  // of all but the last groups_left groups; false if there is none

// The traffic of kernels to and from global memory, as they count it.
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
