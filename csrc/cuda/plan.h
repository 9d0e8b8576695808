// How a call is computed: which kernel, in blocks of how many threads, with what in shared memory. Plain C++, one
// visible predicate: explain() asks it, the operators and the tests use it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace monosoftmax::cuda {

// What a plan is free to choose. Benchmarks and tests ask for other values; everyone else gets these.
struct Tuning {
  bool keeps_rows = true;         // on chip, for the gradient
  int fewest_blocks = 1;          // of a cluster
  int most_threads = 256;         // of a block, at most kMostThreads
  int fewest_threads = 192;       // of a block that keeps its row. Fewer would wait for memory: the row is read again
  int most_threads_losses = 128;  // of a block for losses alone, where there are rows enough to fill the device so
  int rounds_without_sums = 8;    // blocks for each that runs at once, so that none ends long after the others
};

struct Device {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int64_t shared_memory;                 // of a block, at most
  int64_t shared_memory_multiprocessor;  // of all blocks on a multiprocessor
  Tuning tuning{};
};

// Throws std::invalid_argument for what no kernel can be launched with.
void check(const Tuning&);

enum class Rows {
  kOnce,      // read once; no gradient of logits or coefficients is formed from them
  kResident,  // read once and kept on chip for the gradient
  kReread,    // read again for the gradient
};

enum class SumsKind { kNone, kVector, kLanes, kWarps };

struct Plan {
  Rows rows;
  SumsKind sums;
  bool table_in_shared_memory;
  bool atomic;       // one set of sums for all, in an order that changes
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
  bool coefficients;        // those of the coefficients are needed
  bool weighted_smoothing;  // class weights and smoothed labels
  bool deterministic;
};

// Throws std::invalid_argument for a transform that is not in the registry.
Plan make_plan(const PlanRequest&, const Device&);

// In words: "row kept in the shared memory of a cluster of 2 blocks of 224 threads; ...".
std::string describe(const Plan&);

}  // namespace monosoftmax::cuda
