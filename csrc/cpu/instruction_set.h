// Which build of the row kernels runs on this machine.
#pragma once

#include "row_kernels.h"

namespace monosoftmax::cpu {

// The best instruction set that this processor has, or the one that the environment variable
// MONOSOFTMAX_CPU_CAPABILITY (default, avx2 or avx512) names. Throws where the processor does not have that one.
// Decided once a process.
const InstructionSet& instruction_set();

}  // namespace monosoftmax::cpu
