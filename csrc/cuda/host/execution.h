// The state of the machine: the threads, warps and blocks of the cluster that runs, and who waits for what.
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

  // What it waits for, or did last.
  Wait wait;
  Location where;
  Collective collective;
  BlockReduction reduction;
  unsigned mask, source;
  uint64_t value, result;

  std::vector<AsyncCopy> copies;    // that have not happened
  size_t copies_done;               // of those, which the wait that goes on has handed out
  std::vector<size_t> copy_groups;  // the number of copies up to the end of each group

  unsigned lane_bit() const { return 1u << lane; }
};

struct Warp {
  Thread* threads;
  unsigned lanes;  // that there are: not all in the last warp of a block
  unsigned ready, at_collective, ended;
};

struct Block {
  uint3 index;
  unsigned rank;  // in its cluster
  Thread* threads;
  Warp* warps;
  unsigned thread_count, warp_count;
  unsigned at_barrier, ended;
  // The last thread of another block that asked where the shared memory of this one is; from where in the kernel, and
  // after how many Cluster::sync().
  Thread* mapped_by;
  Location mapped_at;
  unsigned mapped_after;
};

struct Execution {
  Fiber host;  // which called launch()
  void (*body)(const void*);
  const void* arguments;
  SharedMemory shared;
  Slots slots;

  // Of one cluster. Vectors keep what they allocated from one cluster to the next.
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  unsigned thread_count, warp_count, block_count;
  size_t first_slot;  // of the threads
  unsigned alive, at_cluster_barrier, cluster_syncs;

  Order order = Order::kForward;
  unsigned seed = 1;
  uint64_t random_state;
  Warp* active;  // whose threads go on as long as they can

  uint64_t random();
};
MONOSOFTMAX_HIDDEN extern Execution execution;

inline Thread& self() { return const_cast<Thread&>(static_cast<const Thread&>(*current)); }

// Lets other threads run until this one is ready again.
void wait();
// Has ended, or waits for what cannot happen: says why, and ends the process.
[[noreturn]] void explain_standstill();
// The message, the place and the thread that runs, if one does. Ends the process.
[[noreturn]] void report_defect(const char* file, unsigned line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
[[noreturn]] void report_defect_of(const Thread& thread, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Its block and its index, in words.
std::string name_of(const Thread& thread);

bool same_place(const Location& a, const Location& b);

// While there is one, the thread sanitizer takes the runtime for the thread that called launch(): for allocations.
class ActAsHost {
 public:
  ActAsHost() : acting_(threads::acting()) { threads::act_as(execution.host.sanitizer_thread); }
  ~ActAsHost() { threads::act_as(acting_); }
  ActAsHost(const ActAsHost&) = delete;
  ActAsHost& operator=(const ActAsHost&) = delete;

 private:
  void* acting_;
};

// An address that the thread sanitizer has never seen: whoever meets at an old one comes after all who met there
// before.
void* fresh_meeting_point();

// Whatever one of the threads did happens before what each of them will do.
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
