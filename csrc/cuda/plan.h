// The plan of a call: its kernel, the threads of a block, and the use of shared memory. It is plain C++, and the only
// place for this choice: operators, tests and explain() all use it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace monosoftmax::cuda {

// The free choices of a plan. Only benchmarks and tests ask for other values.
struct Tuning {
  bool keeps_rows = true;         // on chip, for the gradient
  int fewest_blocks = 1;          // of a cluster
  int most_threads = 256;         // of a block, at most kMostThreads
  int fewest_threads = 192;       // of a block that keeps its row. Fewer would wait for memory, so the row is reread
  int most_threads_losses = 128;  // of a block for losses alone, if the rows are enough to fill the device
  int rounds_without_sums = 8;    // blocks for each block that runs at once, so that none ends long after the others
};

struct Device {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int64_t shared_memory;                 // of a block, at most
  int64_t shared_memory_multiprocessor;  // of all blocks on a multiprocessor
  Tuning tuning{};
};

// Throws std::invalid_argument for values that no kernel can be launched with.
void check(const Tuning&);

enum class Rows {
  kOnce,      // read once, for a call without gradients of logits or coefficients
  kResident,  // read once and kept on chip for the gradient
  kReread,    // read again for the gradient
};

enum class SumsKind { kNone, kVector, kLanes, kWarps };

struct Plan {
  Rows rows;
  SumsKind sums;
  bool table_in_shared_memory;
  bool atomic;       // one set of sums for all, added to in an order that changes
  int blocks;        // of the grid
  int cluster;       // blocks that share a row
  int threads;       // of a block
  int64_t sum_sets;  // sets of sums that are written
  unsigned sums_offset, row_offset, shared_bytes;
};

struct PlanRequest {
  std::string_view transform;
  int64_t size;  // of a row of coefficients
  int64_t rows, classes;
  int element_bytes;
  bool losses, gradient;    // gradient: of logits or coefficients
  bool coefficients;        // the gradients of the coefficients are needed
  bool weighted_smoothing;  // class weights and smoothed labels
  bool deterministic;
};

// Throws std::invalid_argument for a transform that is not in the registry.
Plan make_plan(const PlanRequest&, const Device&);

// In words: "row kept in the shared memory of a cluster of 2 blocks of 224 threads; ...".
std::string describe(const Plan&);

}  // namespace monosoftmax::cuda
