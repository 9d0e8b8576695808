// The loss kernels for logits of type bfloat16.
#include "cross_entropy_launch.cuh"

namespace monosoftmax::cuda {

template void launch_cross_entropy_of<BFloat16>(const Plan&, std::string_view, CrossEntropyArguments, Stream);

}  // namespace monosoftmax::cuda
