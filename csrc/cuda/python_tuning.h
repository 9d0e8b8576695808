// Reads Tuning from keyword arguments in Python, for the extension and for the host execution.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "plan.h"

namespace monosoftmax::cuda {

// The defaults, replaced by the values in `wishes`. Throws std::invalid_argument for unknown names and wrong values.
inline Tuning tuning_of(const pybind11::dict& wishes) {
  Tuning tuning;
  for (const auto& [key, value] : wishes) {
    const auto name = key.cast<std::string>();
    if (name == "keeps_rows") {
      tuning.keeps_rows = value.cast<bool>();
    } else if (name == "fewest_blocks") {
      tuning.fewest_blocks = value.cast<int>();
    } else if (name == "most_threads") {
      tuning.most_threads = value.cast<int>();
    } else if (name == "fewest_threads") {
      tuning.fewest_threads = value.cast<int>();
    } else if (name == "most_threads_losses") {
      tuning.most_threads_losses = value.cast<int>();
    } else if (name == "rounds_without_sums") {
      tuning.rounds_without_sums = value.cast<int>();
    } else {
      throw std::invalid_argument("a plan has no \"" + name + "\" to be tuned");
    }
  }
  check(tuning);
  return tuning;
}

}  // namespace monosoftmax::cuda
