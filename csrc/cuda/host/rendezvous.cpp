// The meetings of threads: collectives of a warp, barriers of a block or cluster. The last thread to arrive computes
// the results and makes all threads ready to go on. Then it waits for its turn like the others.
#include <bit>
#include <cstring>

#include "execution.h"

namespace monosoftmax::cuda::host {
namespace {

MatchStatistics matches;

template <class Function>
void for_each_lane(const Warp& warp, unsigned mask, Function function) {
  for (unsigned left = mask; left != 0; left &= left - 1) function(warp.threads[std::countr_zero(left)]);
}

template <class Function>
void for_each_thread(const Block& block, Function function) {
  for (unsigned i = 0; i < block.thread_count; ++i) function(block.threads[i]);
}

// The result of a thread is its own copy: a lane that runs later must not see the values of the next collective.
void resolve(const Warp& warp, unsigned mask, Collective collective) {
  const auto give_all = [&](uint64_t result) {
    for_each_lane(warp, mask, [&](Thread& thread) { thread.result = result; });
  };
  switch (collective) {
    case Collective::kSync: return order_memory([&](auto function) { for_each_lane(warp, mask, function); });
    case Collective::kShuffle:
      return for_each_lane(warp, mask, [&](Thread& thread) {
        if ((mask >> thread.source & 1) == 0) {
          report_defect_of(thread, "shuffle reads lane %u, which is not in mask 0x%08x", thread.source, mask);
        }
        thread.result = warp.threads[thread.source].value;
      });
    case Collective::kBallot: {
      unsigned votes = 0;
      for_each_lane(warp, mask, [&](Thread& thread) { votes |= static_cast<unsigned>(thread.value) << thread.lane; });
      return give_all(votes);
    }
    case Collective::kMatchAny:
      matches.calls += static_cast<unsigned>(std::popcount(mask));
      for (unsigned left = mask; left != 0;) {
        const uint64_t value = warp.threads[std::countr_zero(left)].value;
        unsigned group = 0;
        for_each_lane(warp, left, [&](Thread& thread) { group |= thread.value == value ? thread.lane_bit() : 0; });
        for_each_lane(warp, group, [&](Thread& thread) { thread.result = group; });
        left &= ~group;
        ++matches.groups;
      }
      return;
    case Collective::kAdd: {
      uint64_t sum = 0;
      for_each_lane(warp, mask, [&](Thread& thread) { sum += thread.value; });
      return give_all(sum);
    }
    case Collective::kMaxSigned:
    case Collective::kMaxUnsigned: {
      // With the first bit flipped, signed numbers have the order of unsigned numbers.
      const unsigned flip = collective == Collective::kMaxSigned ? 0x80000000u : 0u;
      unsigned largest = 0;
      for_each_lane(warp, mask, [&](Thread& thread) {
        const unsigned value = static_cast<unsigned>(thread.value) ^ flip;
        if (value > largest) largest = value;
      });
      return give_all(largest ^ flip);
    }
  }
}

// All threads of a block or cluster are at a barrier. Checks that it is the same barrier.
void check_same_barrier(const Thread& first, const Thread& thread, const char* name) {
  if (same_place(thread.where, first.where) && thread.reduction == first.reduction) return;
  report_defect_of(thread, "barrier divergence: other threads wait in %s at %s:%u", name, first.where.file_name(),
                   first.where.line());
}

void make_ready(const Block& block) {
  for (unsigned w = 0; w < block.warp_count; ++w) block.warps[w].ready = block.warps[w].lanes;
  for_each_thread(block, [](Thread& thread) { thread.wait = Wait::kNothing; });
}

void begin_wait(Thread& thread, Wait wait, Location where) {
  thread.wait = wait;
  thread.where = where;
  thread.warp->ready &= ~thread.lane_bit();
}

}  // namespace

uint64_t warp_collective(Collective collective, unsigned mask, uint64_t value, unsigned source, Location where) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  begin_wait(thread, Wait::kWarp, where);
  thread.collective = collective;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  if ((mask & thread.lane_bit()) == 0) {
    report_defect_of(thread, "warp collective: the calling lane %u is not in its own mask 0x%08x", thread.lane, mask);
  }
  if ((mask & ~warp.lanes) != 0) {
    report_defect_of(thread, "warp collective: mask 0x%08x names lanes beyond the end of the block", mask);
  }
  if ((mask & warp.ended) != 0) {
    report_defect_of(thread, "warp collective: lane %d in mask 0x%08x has exited", std::countr_zero(mask & warp.ended),
                     mask);
  }
  warp.at_collective |= thread.lane_bit();
  if ((mask & ~warp.at_collective) == 0) {
    bool same = true;
    for_each_lane(warp, mask, [&](Thread& other) {
      same = same && other.mask == mask && other.collective == collective && same_place(other.where, where);
    });
    // If not, another lane may still arrive, and let the lanes elsewhere go on to this place.
    if (same) {
      resolve(warp, mask, collective);
      for_each_lane(warp, mask, [](Thread& other) { other.wait = Wait::kNothing; });
      warp.at_collective &= ~mask;
      warp.ready |= mask;
    }
  }
  wait();
  return thread.result;
}

unsigned active_lanes() { return self().warp->lanes & ~self().warp->ended; }

int block_barrier(BlockReduction reduction, bool predicate, Location where) {
  Thread& thread = self();
  Block& block = *thread.in_block;
  begin_wait(thread, Wait::kBlock, where);
  thread.reduction = reduction;
  thread.value = predicate;
  if (++block.at_barrier == block.thread_count) {
    block.at_barrier = 0;
    unsigned count = 0;
    for_each_thread(block, [&](Thread& other) {
      check_same_barrier(block.threads[0], other, "__syncthreads()");
      count += static_cast<unsigned>(other.value);
    });
    const unsigned result = reduction == BlockReduction::kOr    ? count != 0
                            : reduction == BlockReduction::kAnd ? count == block.thread_count
                                                                : count;
    for_each_thread(block, [&](Thread& other) { other.result = result; });
    order_memory([&](auto function) { for_each_thread(block, function); });
    make_ready(block);
    execution.active = nullptr;
  }
  wait();
  return static_cast<int>(thread.result);
}

void cluster_barrier(Location where) {
  Thread& thread = self();
  begin_wait(thread, Wait::kCluster, where);
  thread.reduction = BlockReduction::kNone;
  if (++execution.at_cluster_barrier == execution.thread_count) {
    execution.at_cluster_barrier = 0;
    ++execution.cluster_syncs;
    const auto for_each = [](auto function) {
      for (unsigned b = 0; b < execution.block_count; ++b) for_each_thread(execution.blocks[b], function);
    };
    for_each([](Thread& other) { check_same_barrier(execution.threads[0], other, "Cluster::sync()"); });
    order_memory(for_each);
    for (unsigned b = 0; b < execution.block_count; ++b) make_ready(execution.blocks[b]);
    execution.active = nullptr;
  }
  wait();
}

unsigned cluster_rank() { return self().in_block->rank; }
unsigned cluster_blocks() { return execution.block_count; }

void* shared_of_block(void* mine, unsigned block, Location where) {
  Thread& thread = self();
  thread.where = where;
  const unsigned rank = thread.in_block->rank;
  if (block >= execution.block_count) {
    report_defect_of(thread, "Cluster::of_block(): block %u of a cluster of %u", block, execution.block_count);
  }
  if (!execution.shared.contains(rank, mine)) {
    report_defect_of(thread, "Cluster::of_block(): the address is not in the shared memory of this block");
  }
  if (block == rank) return mine;
  if (execution.cluster_syncs == 0) {
    report_defect_of(thread, "Cluster::of_block(): before the first Cluster::sync() block %u may not have begun",
                     block);
  }
  Block& other = execution.blocks[block];
  if (other.ended == other.thread_count) {
    report_defect_of(thread, "Cluster::of_block(): block %u of the cluster has exited", block);
  }
  other.mapped_by = &thread;
  other.mapped_at = where;
  other.mapped_after = execution.cluster_syncs;
  return execution.shared.in_other_block(mine, rank, block);
}

MatchStatistics match_statistics() { return matches; }
void reset_match_statistics() { matches = {}; }

}  // namespace monosoftmax::cuda::host
