// The kernel for targets of all classes, for logits of type half.
#include "dense_targets_launch.cuh"

namespace monosoftmax::cuda {

template void launch_dense_target_of<Half>(const Plan&, std::string_view, DenseTargetArguments, Stream);

}  // namespace monosoftmax::cuda
