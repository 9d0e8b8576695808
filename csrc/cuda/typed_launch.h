// The launchers for one type of logits, declared for launch.cu. Each type has its own .cu file with the definitions.
#pragma once

#include "launch.h"

namespace monosoftmax::cuda {

template <class E>
void launch_cross_entropy_of(const Plan& plan, std::string_view transform, CrossEntropyArguments arguments,
                             Stream stream);
template <class E>
void launch_log_softmax_of(const Plan& plan, std::string_view transform, const LogSoftmaxArguments& arguments,
                           Stream stream);
template <class E>
void launch_log_softmax_backward_of(const Plan& plan, std::string_view transform, LogSoftmaxBackwardArguments arguments,
                                    Stream stream);
template <class E>
void launch_token_statistics_of(const Plan& plan, std::string_view transform, const TokenStatisticsArguments& arguments,
                                Stream stream);
template <class E>
void launch_dense_target_of(const Plan& plan, std::string_view transform, DenseTargetArguments arguments,
                            Stream stream);

}  // namespace monosoftmax::cuda
