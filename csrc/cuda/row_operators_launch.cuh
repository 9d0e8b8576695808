// Launches the kernels other than the loss by a plan, for one type of logits. Each type has its own .cu file.
#pragma once

#include "dispatch.cuh"
#include "launch_kernel.cuh"
#include "log_softmax.cuh"
#include "token_statistics.cuh"
#include "typed_launch.h"

namespace monosoftmax::cuda {

inline Shape shape_of(const Plan& plan) { return {plan.blocks, plan.threads, plan.shared_bytes}; }

template <class E>
void launch_log_softmax_of(const Plan& plan, std::string_view transform, const LogSoftmaxArguments& arguments,
                           Stream stream) {
  with_kernel_types(plan, transform, [&](auto of) {
    using Types = decltype(of);
    launch_kernel(log_softmax_kernel<typename Types::Transform, typename Types::T, E>, shape_of(plan), stream,
                  arguments);
  });
}

template <class E>
void launch_log_softmax_backward_of(const Plan& plan, std::string_view transform, LogSoftmaxBackwardArguments arguments,
                                    Stream stream) {
  arguments.sums_offset = plan.sums_offset;
  with_kernel_types(plan, transform, [&](auto of) {
    using Types = decltype(of);
    using Transform = typename Types::Transform;
    using T = typename Types::T;
    launch_kernel(plan.sums == SumsKind::kNone ? log_softmax_backward_kernel<Transform, T, NoSums, E>
                                               : log_softmax_backward_kernel<Transform, T, typename Types::Sums, E>,
                  shape_of(plan), stream, arguments);
  });
}

template <class E>
void launch_token_statistics_of(const Plan& plan, std::string_view transform, const TokenStatisticsArguments& arguments,
                                Stream stream) {
  with_kernel_types(plan, transform, [&](auto of) {
    using Types = decltype(of);
    launch_kernel(token_statistics_kernel<typename Types::Transform, typename Types::T, E>, shape_of(plan), stream,
                  arguments);
  });
}

}  // namespace monosoftmax::cuda
