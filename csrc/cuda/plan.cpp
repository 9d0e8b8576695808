#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "../transforms/registry.h"
#include "arguments.h"

namespace monosoftmax::cuda {
namespace {

constexpr int kWarp = 32, kChunkBytes = 16;
// The most static shared memory of a kernel (python -m benchmarks codegen cuda lists it), and the shared memory that
// the system takes for each block. Token statistics have 160 bytes more, but their tables take 16 KiB at most.
constexpr int64_t kStaticBytes = 1024, kSystemBytes = 1024;
constexpr int kFewestThreadsRereading = 64;
constexpr int kMostBlocksOfCluster = 8;
// Threads that a multiprocessor runs at once, if there are enough registers.
constexpr int64_t kThreadsAtOnce = 1536;
// The most bytes of a table for look-ups in shared memory.
constexpr int64_t kMostTableBytes = 16 << 10;
// The most bytes of the tables of all warps. Larger tables are replaced by one table with atomics, or by fewer warps
// if the call must be deterministic.
constexpr int64_t kWarpTablesBytes = 64 << 20, kWarpTablesBytesDeterministic = 256 << 20;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The entries of a table for look-ups in shared memory.
template <template <class> class F>
int64_t entries_of(int64_t size) {
  return size;
}
template <template <class, bool> class F>
int64_t entries_of(int64_t size) {
  return F<float, true>::kUniformPieces ? padded_entries(size) : size;
}

int64_t entries_of(std::string_view transform, int64_t size) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST) \
  if (transform == NAME) return entries_of<CLASS>(size);
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
  return size;
}

class Planner {
 public:
  Planner(const PlanRequest& request, const Device& device)
      : request_(request), device_(device), tuning_(device.tuning) {
    if (!find_transform(request.transform, &shape_)) {
      throw std::invalid_argument("unknown transform \"" + std::string(request.transform) + "\"");
    }
    entries_ = entries_of(request.transform, request.size);
    chunks_ = request.classes * request.element_bytes / kChunkBytes;
  }

  Plan make() {
    Plan plan{};
    plan.cluster = 1;
    plan.table_in_shared_memory = table_bytes() <= kMostTableBytes;
    plan.sums = SumsKind::kNone;
    if (request_.coefficients && request_.size > 0) {
      plan.sums = shape_.table_rows > 0 || shape_.smallest != shape_.largest ? SumsKind::kLanes : SumsKind::kVector;
    }
    const bool keep = tuning_.keeps_rows && request_.losses && request_.gradient && !request_.weighted_smoothing;
    plan.rows = !request_.gradient ? Rows::kOnce : keep ? Rows::kResident : Rows::kReread;
    if (!(plan.rows == Rows::kResident && plan.table_in_shared_memory && fit_resident(plan)) && !fit(plan)) {
      // Shared memory has no room for a table of each thread.
      plan.sums = SumsKind::kWarps;
      plan.table_in_shared_memory = false;
      fit(plan);
    }
    choose_blocks(plan);
    return plan;
  }

 private:
  int64_t table_bytes() const { return entries_ * table_stride(std::max(shape_.table_rows, 1)) * 4; }
  int64_t coefficient_bytes(const Plan& plan) const {
    if (shape_.table_rows == 0) return round_up(4 * request_.size, kChunkBytes);
    return plan.table_in_shared_memory ? round_up(table_bytes(), kChunkBytes) : 0;
  }
  // The bytes of shared memory for the sums of a thread.
  int64_t lane_bytes(const Plan& plan) const {
    if (plan.sums != SumsKind::kLanes) return 0;
    return 4 * (shape_.table_rows == 0 ? request_.size : entries_ * shape_.table_rows);
  }
  int most_threads(int cluster) const {
    const int64_t wanted = round_up(divide_up(chunks_, cluster), kWarp);
    return static_cast<int>(std::clamp(wanted, int64_t{kWarp}, int64_t{tuning_.most_threads}));
  }
  int64_t row_bytes(int threads, int cluster) const {
    return divide_up(chunks_, static_cast<int64_t>(threads) * cluster) * threads * kChunkBytes;
  }
  bool take(Plan& plan, int threads, int64_t row_bytes) const {
    const int64_t sums_offset = coefficient_bytes(plan);
    const int64_t row_offset = round_up(sums_offset + threads * lane_bytes(plan), kChunkBytes);
    if (row_offset + row_bytes + kStaticBytes > device_.shared_memory) return false;
    plan.threads = threads;
    plan.sums_offset = static_cast<unsigned>(sums_offset);
    plan.row_offset = static_cast<unsigned>(row_offset);
    plan.shared_bytes = static_cast<unsigned>(row_offset + row_bytes);
    return true;
  }
  // Keeps a row on chip, in one block or in as few blocks as it takes. It takes more blocks if rows are few.
  bool fit_resident(Plan& plan) const {
    const int most_blocks = device_.capability >= 90 ? kMostBlocksOfCluster : 1;
    for (int cluster = tuning_.fewest_blocks; cluster <= most_blocks; cluster *= 2) {
      const bool idle = 2 * cluster * request_.rows <= device_.multiprocessors;
      if (idle && 2 * cluster <= most_blocks && chunks_ >= 2 * cluster * tuning_.fewest_threads) continue;
      const int most = most_threads(cluster);
      for (int threads = most; threads >= std::min(most, tuning_.fewest_threads); threads -= kWarp) {
        plan.cluster = cluster;
        if (take(plan, threads, row_bytes(threads, cluster))) return true;
      }
    }
    plan.cluster = 1;
    return false;
  }
  bool fit(Plan& plan) const {
    if (plan.rows == Rows::kResident) plan.rows = Rows::kReread;
    if (plan.sums == SumsKind::kLanes && !plan.table_in_shared_memory && shape_.table_rows > 0) return false;
    int most = most_threads(1);
    const bool full = request_.rows * tuning_.most_threads_losses >= device_.multiprocessors * kThreadsAtOnce;
    if (plan.rows == Rows::kOnce && request_.losses && full) most = std::min(most, tuning_.most_threads_losses);
    for (int threads = most; threads >= std::min(most, kFewestThreadsRereading); threads -= kWarp) {
      if (take(plan, threads, 0)) return true;
    }
    return false;
  }
  void choose_blocks(Plan& plan) const {
    const int64_t by_memory = device_.shared_memory_multiprocessor / (plan.shared_bytes + kStaticBytes + kSystemBytes);
    const int64_t at_once = std::clamp(kThreadsAtOnce / plan.threads, int64_t{1}, std::max<int64_t>(by_memory, 1));
    // With sums there are only as many blocks as run at once, since each adds up its own sums. Without sums there are
    // more, so that no block ends long after the others.
    const int64_t rounds = plan.sums == SumsKind::kNone ? tuning_.rounds_without_sums : 1;
    int64_t teams = std::max<int64_t>(1, at_once * rounds * device_.multiprocessors / plan.cluster);
    teams = std::min(teams, request_.rows);
    if (plan.sums == SumsKind::kWarps) {
      const int64_t table = 4 * shape_.table_rows * request_.size;
      const int64_t most = request_.deterministic ? kWarpTablesBytesDeterministic : kWarpTablesBytes;
      plan.atomic = !request_.deterministic && teams * (plan.threads / kWarp) * table > most;
      if (!plan.atomic) {
        plan.threads = static_cast<int>(std::clamp(most / table * kWarp, int64_t{kWarp}, int64_t{plan.threads}));
        teams = std::clamp(most / (table * (plan.threads / kWarp)), int64_t{1}, teams);
      }
    }
    plan.blocks = static_cast<int>(std::min<int64_t>(teams, 1 << 20)) * plan.cluster;
    plan.sum_sets =
        plan.sums == SumsKind::kWarps ? (plan.atomic ? 1 : plan.blocks * int64_t{plan.threads / kWarp}) : plan.blocks;
  }

  const PlanRequest& request_;
  const Device& device_;
  const Tuning& tuning_;
  TransformShape shape_{};
  int64_t entries_, chunks_;
};

}  // namespace

void check(const Tuning& tuning) {
  const auto require = [](bool met, const char* what) {
    if (!met) throw std::invalid_argument(what);
  };
  const int blocks = tuning.fewest_blocks;
  require(blocks == 1 || blocks == 2 || blocks == 4 || blocks == kMostBlocksOfCluster,
          "fewest_blocks must be 1, 2, 4 or 8");
  for (const int threads : {tuning.most_threads, tuning.fewest_threads, tuning.most_threads_losses}) {
    require(threads >= kWarp && threads <= kMostThreads && threads % kWarp == 0,
            "numbers of threads must be multiples of 32 from 32 to 256");
  }
  require(tuning.rounds_without_sums >= 1, "rounds_without_sums must be at least 1");
}

Plan make_plan(const PlanRequest& request, const Device& device) { return Planner(request, device).make(); }

std::string describe(const Plan& plan) {
  std::string text;
  const std::string threads = std::to_string(plan.threads) + " threads";
  switch (plan.rows) {
    case Rows::kOnce: text = "rows read once, by blocks of " + threads; break;
    case Rows::kReread: text = "rows read again for the gradient, by blocks of " + threads; break;
    case Rows::kResident:
      text = plan.cluster == 1 ? "rows kept in the shared memory of a block of " + threads
                               : "rows kept in the shared memory of a cluster of " + std::to_string(plan.cluster) +
                                     " blocks of " + threads;
  }
  switch (plan.sums) {
    case SumsKind::kNone: break;
    case SumsKind::kVector: text += "; coefficient gradients summed in registers"; break;
    case SumsKind::kLanes: text += "; coefficient gradients summed in a table of each thread in shared memory"; break;
    case SumsKind::kWarps:
      text += plan.atomic ? "; coefficient gradients summed by atomics in global memory, in an order that changes"
                          : "; coefficient gradients summed in a table of each warp in global memory";
  }
  return text;
}

}  // namespace monosoftmax::cuda
