// Chooses the template arguments of kernels by the name of a transform and a plan.
#pragma once

#include <string_view>
#include <type_traits>

#include "../transforms/registry.h"
#include "coefficient_sums.cuh"
#include "plan.h"
#include "transform.cuh"

namespace monosoftmax::cuda {

// kMayBeKept: whether there are kernels that keep rows on chip. There are none for tables in global memory.
template <class Transform_, class T_, class Sums_, bool kMayBeKept_>
struct KernelTypes {
  using Transform = Transform_;
  using T = T_;
  using Sums = Sums_;
  static constexpr bool kMayBeKept = kMayBeKept_;
};

template <template <class> class F, int kRows, int kSmallest, int kLargest, class Visitor>
void visit_kernel_types(const Plan&, Visitor&& visitor) {
  using T = LogitsOf<kRows, kSmallest, kLargest>;
  using Sums =
      std::conditional_t<kLargest == 0, NoSums,
                         std::conditional_t<kSmallest == kLargest, VectorSums<T, kLargest>, LaneSums<F<T>, T>>>;
  visitor(KernelTypes<VectorTransform<F, T>, T, Sums, true>());
}
template <template <class, bool> class F, int kRows, int kSmallest, int kLargest, class Visitor>
void visit_kernel_types(const Plan& plan, Visitor&& visitor) {
  using T = LogitsOf<kRows, kSmallest, kLargest>;
  if (plan.table_in_shared_memory) {
    visitor(KernelTypes<TableTransform<F, T, true>, T, LaneSums<F<T, true>, T>, true>());
  } else {
    visitor(KernelTypes<TableTransform<F, T, false>, T, WarpSums<F<T, false>, T>, false>());
  }
}

// Calls visitor(KernelTypes<...>()) with the types for a transform of the registry.
template <class Visitor>
void with_kernel_types(const Plan& plan, std::string_view transform, Visitor&& visitor) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST) \
  if (transform == NAME) return visit_kernel_types<CLASS, ROWS, SMALLEST, LARGEST>(plan, visitor);
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
}

}  // namespace monosoftmax::cuda
