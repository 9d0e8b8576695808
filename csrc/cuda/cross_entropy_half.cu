// The loss kernels for logits of type half.
#include "cross_entropy_launch.cuh"

namespace monosoftmax::cuda {

template void launch_cross_entropy_of<Half>(const Plan&, std::string_view, CrossEntropyArguments, Stream);

}  // namespace monosoftmax::cuda
