// log_softmax, its backward pass and token_statistics for logits of type bfloat16.
#include "row_operators_launch.cuh"

namespace monosoftmax::cuda {

template void launch_log_softmax_of<BFloat16>(const Plan&, std::string_view, const LogSoftmaxArguments&, Stream);
template void launch_log_softmax_backward_of<BFloat16>(const Plan&, std::string_view, LogSoftmaxBackwardArguments,
                                                       Stream);
template void launch_token_statistics_of<BFloat16>(const Plan&, std::string_view, const TokenStatisticsArguments&,
                                                   Stream);

}  // namespace monosoftmax::cuda
