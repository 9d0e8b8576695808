// The kernel for targets of all classes, for logits of type float.
#include "dense_targets_launch.cuh"

namespace monosoftmax::cuda {

template void launch_dense_target_of<float>(const Plan&, std::string_view, DenseTargetArguments, Stream);

}  // namespace monosoftmax::cuda
