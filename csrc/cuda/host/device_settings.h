// The GPU that plans assume for the host execution.
#pragma once

#include "../plan.h"

namespace monosoftmax::cuda::host {

inline Device& device() {
  static Device device{90, 2, 227 << 10, 228 << 10};
  return device;
}

}  // namespace monosoftmax::cuda::host
