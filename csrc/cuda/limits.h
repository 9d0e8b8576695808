// Limits for the tensors of the cuda backend.
#pragma once

#include <limits>

#include "../checked.h"
#include "torch_device.h"

namespace monosoftmax::cuda {

inline const Memory kMemory{&is_ours, "a CUDA device"};

// The number of a table entry is in the last bits of a float (arithmetic.cuh).
constexpr int64_t kMostPieces = 1 << 22;

// Columns are numbered by int.
constexpr int64_t kMostColumns = std::numeric_limits<int>::max() / 2;

}  // namespace monosoftmax::cuda
