// Launches kernels from host code, and reads and sets the state of the machine that they run on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"

namespace monosoftmax::cuda::host {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // of dynamic shared memory
  unsigned cluster = 1;     // blocks in a cluster, along x
};

// Returns when body has run for every thread of every block.
void run(std::integral_constant<Build, kBuild>, const LaunchShape& shape, void (*body)(const void*),
         const void* arguments);

// Like kernel<<<...>>>(arguments...) and a wait for it. Throws std::invalid_argument for a shape that a GPU would
// refuse. Clusters, or blocks, run one after another. The threads of one cluster take turns if one of them has to wait.
template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchShape& shape, A... arguments) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernels take their arguments as copies of bytes");
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernels have at most 4 KiB of arguments");
  using Call = std::tuple<void (*)(P...), P...>;
  const Call call(kernel, static_cast<P>(arguments)...);
  const auto body = []<size_t... i>(std::index_sequence<i...>) {
    return +[](const void* packed) {
      const Call& unpacked = *static_cast<const Call*>(packed);
      std::get<0>(unpacked)(std::get<i + 1>(unpacked)...);
    };
  }(std::index_sequence_for<P...>());
  run(std::integral_constant<Build, kBuild>(), shape, body, &call);
}

// The order of blocks, and of threads if several could run. A clean kernel gives the same results in every order.
// kRandom draws anew from the seed at each launch.
enum class Order { kForward, kReverse, kRandom };
void set_order(Order order, unsigned seed = 1);

// The most shared memory of a block, static and dynamic together: 227 KiB unless set (sm_90; 99 KiB on sm_86 and
// sm_89).
void set_shared_limit(size_t bytes);

// The counts of MONOSOFTMAX_GLOBAL_READ and MONOSOFTMAX_GLOBAL_WRITE since the last reset.
Traffic traffic();
void reset_traffic();

// The lanes that took part in a __match_any_sync since the last reset, and the groups of equal values among them.
struct MatchStatistics {
  uint64_t calls, groups;
};
MatchStatistics match_statistics();
void reset_match_statistics();

}  // namespace monosoftmax::cuda::host
