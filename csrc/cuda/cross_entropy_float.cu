// The loss kernels for logits of type float.
#include "cross_entropy_launch.cuh"

namespace monosoftmax::cuda {

template void launch_cross_entropy_of<float>(const Plan&, std::string_view, CrossEntropyArguments, Stream);

}  // namespace monosoftmax::cuda
