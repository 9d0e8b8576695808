// The row kernels for the AVX512 instructions.
#include "row_kernels_impl.h"

namespace monosoftmax::cpu {

const InstructionSet kAvx512{"avx512", row_kernels<float>(), row_kernels<double>()};

}  // namespace monosoftmax::cpu
