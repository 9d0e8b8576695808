// Chooses the build of the row kernels for this machine.
#pragma once

#include "row_kernels.h"

namespace monosoftmax::cpu {

// The best instruction set of this processor, or the one in the environment variable MONOSOFTMAX_CPU_CAPABILITY
// (default, avx2 or avx512). Throws if the processor does not have the latter. The choice is made once a process.
const InstructionSet& instruction_set();

}  // namespace monosoftmax::cpu
