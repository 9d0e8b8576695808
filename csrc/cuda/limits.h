// Which tensors the operators of the cuda backend take.
#pragma once

#include <limits>

#include "../checked.h"
#include "torch_device.h"

namespace monosoftmax::cuda {

inline const Memory kMemory{&is_ours, "a CUDA device"};

// Entries of a table are counted in the last bits of a float (arithmetic.cuh).
constexpr int64_t kMostPieces = 1 << 22;

// Columns are numbered by int.
constexpr int64_t kMostColumns = std::numeric_limits<int>::max() / 2;

}  // namespace monosoftmax::cuda
