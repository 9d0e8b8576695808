// Launches the kernel for targets of all classes by a plan, for one type of logits. Each type has its own .cu file.
#pragma once

#include "dense_targets.cuh"
#include "dispatch.cuh"
#include "launch_kernel.cuh"
#include "typed_launch.h"

namespace monosoftmax::cuda {

template <class E>
void launch_dense_target_of(const Plan& plan, std::string_view transform, DenseTargetArguments arguments,
                            Stream stream) {
  arguments.sums_offset = plan.sums_offset;
  with_kernel_types(plan, transform, [&](auto of) {
    using Types = decltype(of);
    using Transform = typename Types::Transform;
    using T = typename Types::T;
    launch_kernel(plan.sums == SumsKind::kNone ? dense_target_kernel<Transform, T, NoSums, E>
                                               : dense_target_kernel<Transform, T, typename Types::Sums, E>,
                  {plan.blocks, plan.threads, plan.shared_bytes}, stream, arguments);
  });
}

}  // namespace monosoftmax::cuda
