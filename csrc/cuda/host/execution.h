// The state of the machine: the threads, warps and blocks of the running cluster, and the waits of its threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"
#include "launch.h"
#include "runtime.h"
#include "sanitizers.h"
#include "shared_memory.h"

namespace monosoftmax::cuda::host {

struct Block;
struct Warp;

enum class Wait : uint8_t { kNothing, kWarp, kBlock, kCluster };

struct Thread : ThreadIndices {
  Fiber fiber;
  Block* in_block;
  Warp* warp;
  bool ended;

  // The current wait of the thread, or its last action.
  Wait wait;
  Location where;
  Collective collective;
  BlockReduction reduction;
  unsigned mask, source;
  uint64_t value, result;

  std::vector<AsyncCopy> copies;    // not yet performed
  size_t copies_done;               // the number of copies that the current wait has handed out
  std::vector<size_t> copy_groups;  // the number of copies up to the end of each group

  unsigned lane_bit() const { return 1u << lane; }
};

struct Warp {
  Thread* threads;
  unsigned lanes;  // the lanes that exist: not all 32 in the last warp of a block
  unsigned ready, at_collective, ended;
};

struct Block {
  uint3 index;
  unsigned rank;  // in its cluster
  Thread* threads;
  Warp* warps;
  unsigned thread_count, warp_count;
  unsigned at_barrier, ended;
  // The last thread of another block that asked for the shared memory of this block; the place in the kernel, and the
  // number of Cluster::sync() before.
  Thread* mapped_by;
  Location mapped_at;
  unsigned mapped_after;
};

struct Execution {
  Fiber host;  // the fiber that called launch()
  void (*body)(const void*);
  const void* arguments;
  SharedMemory shared;
  Slots slots;

  // The state of one cluster. Vectors keep their memory from one cluster to the next.
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  unsigned thread_count, warp_count, block_count;
  size_t first_slot;  // of the threads
  unsigned alive, at_cluster_barrier, cluster_syncs;

  Order order = Order::kForward;
  unsigned seed = 1;
  uint64_t random_state;
  Warp* active;  // its threads go on as long as they can

  uint64_t random();
};
MONOSOFTMAX_HIDDEN extern Execution execution;

inline Thread& self() { return const_cast<Thread&>(static_cast<const Thread&>(*current)); }

// Lets other threads run until this one is ready again.
void wait();
// Reports why no thread can go on, and ends the process.
[[noreturn]] void explain_standstill();
// Reports the message, the place and the running thread, if there is one, and ends the process.
[[noreturn]] void report_defect(const char* file, unsigned line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
[[noreturn]] void report_defect_of(const Thread& thread, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The block and the index of a thread, in words.
std::string name_of(const Thread& thread);

bool same_place(const Location& a, const Location& b);

// While this object lives, the thread sanitizer takes the runtime for the thread that called launch(). Allocations of
// the runtime need this.
class ActAsHost {
 public:
  ActAsHost() : acting_(threads::acting()) { threads::act_as(execution.host.sanitizer_thread); }
  ~ActAsHost() { threads::act_as(acting_); }
  ActAsHost(const ActAsHost&) = delete;
  ActAsHost& operator=(const ActAsHost&) = delete;

 private:
  void* acting_;
};

// An address that the thread sanitizer has never seen. At an old address, threads would come after all threads that
// met there before.
void* fresh_meeting_point();

// Orders memory: all past actions of any of the threads happen before all future actions of each of them.
template <class ForEachThread>
void order_memory(ForEachThread for_each_thread) {
  if constexpr (kBuild == Build::kThread) {
    void* acting = threads::acting();
    void* meeting_point = fresh_meeting_point();
    for_each_thread([&](Thread& thread) {
      threads::act_as(thread.fiber.sanitizer_thread);
      threads::release(meeting_point);
    });
    for_each_thread([&](Thread& thread) {
      threads::act_as(thread.fiber.sanitizer_thread);
      threads::acquire(meeting_point);
    });
    threads::act_as(acting);
  }
}

}  // namespace monosoftmax::cuda::host
