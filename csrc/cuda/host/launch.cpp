// Launches a kernel: checks the shape, and runs clusters one after another. The threads of a cluster take turns.
#include "launch.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "execution.h"

namespace monosoftmax::cuda::host {

const ThreadIndices* current = nullptr;
Traffic traffic_so_far;
Execution execution;

uint64_t Execution::random() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1dull >> 32;
}

namespace {

// Chooses a warp, in the order of execution. A warp goes on as long as one of its lanes can.
Warp* choose_warp() {
  Warp* warps = execution.warps.data();
  const unsigned count = execution.warp_count;
  switch (execution.order) {
    case Order::kForward:
      for (unsigned i = 0; i < count; ++i) {
        if (warps[i].ready != 0) return &warps[i];
      }
      break;
    case Order::kReverse:
      for (unsigned i = count; i-- > 0;) {
        if (warps[i].ready != 0) return &warps[i];
      }
      break;
    case Order::kRandom: {
      const auto start = static_cast<unsigned>(execution.random() % count);
      for (unsigned i = 0; i < count; ++i) {
        Warp* warp = &warps[start + i < count ? start + i : start + i - count];
        if (warp->ready != 0) return warp;
      }
      break;
    }
  }
  return nullptr;
}

int choose_lane(unsigned ready) {
  switch (execution.order) {
    case Order::kForward: return std::countr_zero(ready);
    case Order::kReverse: return 31 - std::countl_zero(ready);
    case Order::kRandom:
      for (auto skip = execution.random() % static_cast<unsigned>(std::popcount(ready)); skip > 0; --skip) {
        ready &= ready - 1;
      }
      return std::countr_zero(ready);
  }
  __builtin_unreachable();
}

// Null if no thread is ready.
Thread* choose_thread() {
  Warp* warp = execution.active;
  if (warp == nullptr || warp->ready == 0 || execution.order == Order::kRandom) {
    warp = choose_warp();
    if (warp == nullptr) return nullptr;
    execution.active = warp;
  }
  return &warp->threads[choose_lane(warp->ready)];
}

void end_block(Block& block) {
  if (block.mapped_by != nullptr && block.mapped_after == execution.cluster_syncs) {
    block.mapped_by->where = block.mapped_at;
    report_defect_of(*block.mapped_by,
                     "block %u of the cluster has exited while its shared memory may be in use: no Cluster::sync() "
                     "since Cluster::of_block()",
                     block.rank);
  }
  if (execution.alive > 0 && execution.block_count > 1) execution.shared.forbid(block.rank);
}

void thread_main() {
  enter_fiber(&execution.host);
  execution.body(execution.arguments);
  Thread& thread = self();
  if (!thread.copies.empty()) {
    report_defect_of(thread, "the thread has exited with %zu asynchronous copies in flight", thread.copies.size());
  }
  thread.ended = true;
  thread.warp->ended |= thread.lane_bit();
  thread.warp->ready &= ~thread.lane_bit();
  --execution.alive;
  if (++thread.in_block->ended == thread.in_block->thread_count) end_block(*thread.in_block);
  Thread* next = choose_thread();
  if (next == nullptr && execution.alive > 0) explain_standstill();
  current = next;
  end_fiber(&thread.fiber, next == nullptr ? &execution.host : &next->fiber);
}

// The threads of a launch come after all that the host did before it, and the host comes after all of them.
char launch_begins, launch_ends;

void begin_thread(Thread* thread, unsigned index, Block* block, const LaunchShape& shape, size_t slot) {
  const dim3& extent = shape.block;
  thread->thread = {index % extent.x, index / extent.x % extent.y, index / (extent.x * extent.y)};
  thread->block = block->index;
  thread->block_extent = extent;
  thread->grid_extent = shape.grid;
  thread->lane = index % 32;
  thread->in_block = block;
  thread->warp = &block->warps[index / 32];
  thread->ended = false;
  thread->wait = Wait::kNothing;
  thread->where = {};
  thread->copies.clear();
  thread->copy_groups.clear();
  thread->copies_done = 0;
  // Stacks that all begin at the same offset in a page would compete for the same few lines of the cache.
  const size_t offset = slot % 16 * 256;
  prepare(&thread->fiber, execution.slots[slot], Slots::kStackBytes - offset, thread_main);
  if constexpr (kBuild == Build::kThread) {
    threads::name(thread->fiber.sanitizer_thread, name_of(*thread).c_str());
    threads::act_as(thread->fiber.sanitizer_thread);
    threads::acquire(&launch_begins);
    threads::act_as(execution.host.sanitizer_thread);
  }
}

// Each block should have its own threads of the thread sanitizer, since blocks are not ordered. But a new thread costs
// the sanitizer half a millisecond and 800 KiB, and it takes the place of an ended thread in the clocks anyway. So
// there are some sets of threads, each for a cluster. Races are found between all blocks of a launch, except blocks
// with the same set. In a random order, these are other blocks each time.
constexpr unsigned kSanitizerThreads = 2048;
constexpr unsigned kMostThreadsAtOnce = kBuild == Build::kThread ? 2048 : 16384;

void choose_slots(size_t cluster) {
  Execution& e = execution;
  const size_t sets = kBuild == Build::kThread ? std::max(kSanitizerThreads / e.thread_count, 2u) : 1;
  e.first_slot = cluster % sets * e.thread_count;
  e.slots.provide(e.first_slot + e.thread_count);
}

// Runs a cluster, the nth of the launch.
void run_cluster(const LaunchShape& shape, uint3 first_block, size_t nth) {
  Execution& e = execution;
  const unsigned block_threads = shape.block.x * shape.block.y * shape.block.z;
  const unsigned block_warps = (block_threads + 31) / 32;
  e.alive = e.thread_count;
  e.at_cluster_barrier = e.cluster_syncs = 0;
  e.active = nullptr;
  choose_slots(nth);
  e.shared.begin(e.block_count, shape.shared_bytes);
  threads::release(&launch_begins);
  for (unsigned b = 0; b < e.block_count; ++b) {
    Block* block = &e.blocks[b];
    *block = {.index = {first_block.x + b, first_block.y, first_block.z},
              .rank = b,
              .threads = &e.threads[b * block_threads],
              .warps = &e.warps[b * block_warps],
              .thread_count = block_threads,
              .warp_count = block_warps,
              .at_barrier = 0,
              .ended = 0,
              .mapped_by = nullptr,
              .mapped_at = {},
              .mapped_after = 0};
    for (unsigned w = 0; w < block_warps; ++w) {
      const unsigned lanes = std::min(32u, block_threads - w * 32);
      const unsigned mask = lanes == 32 ? ~0u : (1u << lanes) - 1;
      block->warps[w] = {
          .threads = block->threads + w * 32, .lanes = mask, .ready = mask, .at_collective = 0, .ended = 0};
    }
    for (unsigned i = 0; i < block_threads; ++i) {
      begin_thread(&block->threads[i], i, block, shape, e.first_slot + b * block_threads + i);
    }
  }

  Thread* first = choose_thread();
  current = first;
  e.host.stack = nullptr;
  switch_fiber(&e.host, &first->fiber);

  for (unsigned i = 0; i < e.thread_count; ++i) {
    threads::act_as(e.threads[i].fiber.sanitizer_thread);
    threads::release(&launch_ends);
  }
  threads::act_as(e.host.sanitizer_thread);
  e.shared.end();
}

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument("invalid launch: " + message);
}

void check(const LaunchShape& shape) {
  const auto written = [](const dim3& extent) {
    return "(" + std::to_string(extent.x) + ", " + std::to_string(extent.y) + ", " + std::to_string(extent.z) + ")";
  };
  const dim3& grid = shape.grid;
  const dim3& block = shape.block;
  require(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535,
          "grid of " + written(grid) + " blocks, at most (2147483647, 65535, 65535)");
  require(block.x > 0 && block.y > 0 && block.z > 0 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
              block.x * block.y * block.z <= 1024,
          "block of " + written(block) + " threads, at most (1024, 1024, 64) and 1024 in all");
  require(shape.shared_bytes <= shared_limit, "dynamic shared memory of " + std::to_string(shape.shared_bytes) +
                                                  " bytes, at most " + std::to_string(shared_limit));
  require(shape.cluster >= 1 && shape.cluster <= 16,
          "cluster of " + std::to_string(shape.cluster) + " blocks, at most 16");
  require(grid.x % shape.cluster == 0,
          "grid of " + written(grid) + " blocks is not made of clusters of " + std::to_string(shape.cluster));
  require(shape.cluster * block.x * block.y * block.z <= kMostThreadsAtOnce,
          "cluster of " + std::to_string(shape.cluster * block.x * block.y * block.z) + " threads, at most " +
              std::to_string(kMostThreadsAtOnce) + " in a build with the thread sanitizer");
}

std::mutex one_launch;

}  // namespace

void wait() {
  Thread& thread = self();
  Thread* next = choose_thread();
  if (next == nullptr) explain_standstill();
  if (next == &thread) return;
  current = next;
  switch_fiber(&thread.fiber, &next->fiber);
}

void run(std::integral_constant<Build, kBuild>, const LaunchShape& shape, void (*body)(const void*),
         const void* arguments) {
  const std::lock_guard lock(one_launch);
  check(shape);
  Execution& e = execution;
  e.host.sanitizer_thread = threads::acting();
  e.body = body;
  e.arguments = arguments;
  const unsigned block_threads = shape.block.x * shape.block.y * shape.block.z;
  e.block_count = shape.cluster;
  e.thread_count = e.block_count * block_threads;
  e.warp_count = e.block_count * ((block_threads + 31) / 32);
  if (e.threads.size() < e.thread_count) e.threads.resize(e.thread_count);
  if (e.warps.size() < e.warp_count) e.warps.resize(e.warp_count);
  if (e.blocks.size() < e.block_count) e.blocks.resize(e.block_count);
  e.random_state = 0x9e3779b97f4a7c15ull ^ e.seed;

  const dim3 clusters(shape.grid.x / shape.cluster, shape.grid.y, shape.grid.z);
  const size_t count = size_t{clusters.x} * clusters.y * clusters.z;
  std::vector<uint32_t> drawn;
  if (e.order == Order::kRandom) {
    drawn.resize(count);
    std::iota(drawn.begin(), drawn.end(), 0);
    for (size_t i = count; i > 1; --i) std::swap(drawn[i - 1], drawn[e.random() % i]);
  }
  for (size_t i = 0; i < count; ++i) {
    const size_t cluster = e.order == Order::kForward ? i : e.order == Order::kReverse ? count - 1 - i : drawn[i];
    run_cluster(shape,
                {static_cast<unsigned>(cluster % clusters.x * shape.cluster),
                 static_cast<unsigned>(cluster / clusters.x % clusters.y),
                 static_cast<unsigned>(cluster / clusters.x / clusters.y)},
                i);
  }
  threads::acquire(&launch_ends);
  current = nullptr;
}

void set_order(Order order, unsigned seed) {
  const std::lock_guard lock(one_launch);
  execution.order = order;
  execution.seed = seed;
}

void set_shared_limit(size_t bytes) {
  if (bytes > kMostSharedBytes) {
    throw std::invalid_argument("no GPU has " + std::to_string(bytes) + " bytes of shared memory for a block");
  }
  const std::lock_guard lock(one_launch);
  shared_limit = bytes;
}

Traffic traffic() { return traffic_so_far; }
void reset_traffic() { traffic_so_far = {}; }

}  // namespace monosoftmax::cuda::host
