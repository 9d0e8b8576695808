// The kernel for targets of all classes, for logits of type bfloat16.
#include "dense_targets_launch.cuh"

namespace monosoftmax::cuda {

template void launch_dense_target_of<BFloat16>(const Plan&, std::string_view, DenseTargetArguments, Stream);

}  // namespace monosoftmax::cuda
