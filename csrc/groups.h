// The named groups of monosoftmax/groups.py that reach C++, with the same fields in the same order. groups.py explains
// the fields.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string_view>

namespace monosoftmax::groups {

using at::Tensor;
using Optional = std::optional<Tensor>;

struct Transform {
  Tensor coefficients;
  std::string_view name;  // points into the Python string, which the caller holds
  c10::SmallVector<double, 4> constants, inner;
  Optional temperature;
};

struct LossOptions {
  Optional weight;
  int64_t ignore_index;
  double label_smoothing, z_loss;
  bool return_lse;
};

struct Divergence {
  std::string_view kind;
  double beta;
};

struct Upstream {
  Optional loss, lse, factor, entropy;
};

struct TokenStatistics {
  Tensor log_prob, entropy, argmax, lse, rank, row_stats;
};

// Which gradients a call computes. Python has a plain tuple of two bools.
struct OutputMask {
  bool rows, coefficients;

  bool any() const { return rows || coefficients; }
};

struct RowResults {
  Tensor loss, lse, row_stats, grad_rows, grad_coefficients;
};

}  // namespace monosoftmax::groups
