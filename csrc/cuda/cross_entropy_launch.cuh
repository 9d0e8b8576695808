// Launches the loss kernels by a plan, for one type of logits. Each type has its own .cu file, so that they compile in
// parallel.
#pragma once

#include "cross_entropy.cuh"
#include "dispatch.cuh"
#include "launch_kernel.cuh"
#include "typed_launch.h"

namespace monosoftmax::cuda {

using LossKernel = void (*)(CrossEntropyArguments);

template <class Types, class Sums, class E>
LossKernel gradient_kernel_of(const Plan& plan) {
  using Transform = typename Types::Transform;
  using T = typename Types::T;
  if constexpr (Types::kMayBeKept) {
    if (plan.rows == Rows::kResident) return cross_entropy_gradient_kernel<Transform, T, Sums, E, true>;
  }
  return cross_entropy_gradient_kernel<Transform, T, Sums, E, false>;
}

template <class Types, class E>
LossKernel loss_kernel_of(const Plan& plan) {
  if (plan.rows == Rows::kOnce) return cross_entropy_kernel<typename Types::Transform, typename Types::T, E>;
  return plan.sums == SumsKind::kNone ? gradient_kernel_of<Types, NoSums, E>(plan)
                                      : gradient_kernel_of<Types, typename Types::Sums, E>(plan);
}

template <class E>
void launch_cross_entropy_of(const Plan& plan, std::string_view transform, CrossEntropyArguments arguments,
                             Stream stream) {
  arguments.sums_offset = plan.sums_offset;
  arguments.row_offset = plan.row_offset;
  with_kernel_types(plan, transform, [&](auto types) {
    launch_kernel(loss_kernel_of<decltype(types), E>(plan),
                  {plan.blocks, plan.threads, plan.shared_bytes, plan.cluster}, stream, arguments);
  });
}

}  // namespace monosoftmax::cuda
