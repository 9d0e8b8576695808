// The row kernels for the baseline instructions of the target.
#include "row_kernels_impl.h"

namespace monosoftmax::cpu {

const InstructionSet kDefault{"default", row_kernels<float>(), row_kernels<double>()};

}  // namespace monosoftmax::cpu
