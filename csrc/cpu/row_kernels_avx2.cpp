// The row kernels for the AVX2 instructions.
#include "row_kernels_impl.h"

namespace monosoftmax::cpu {

const InstructionSet kAvx2{"avx2", row_kernels<float>(), row_kernels<double>()};

}  // namespace monosoftmax::cpu
