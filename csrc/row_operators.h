// The functions of a backend for Python. Their contract is in monosoftmax/row_kernels.py.
#pragma once

#include <tuple>

#include "groups.h"

namespace monosoftmax {

using at::Tensor;
using groups::Optional;

struct RowOperators {
  groups::RowResults (*cross_entropy)(const Tensor& rows, const Tensor& target, const groups::Transform&,
                                      const groups::LossOptions&, const std::optional<groups::Upstream>&,
                                      const Optional& row_stats, groups::OutputMask, const Optional& grad_rows);
  groups::TokenStatistics (*token_statistics)(const Tensor& rows, const Tensor& target, const groups::Transform&,
                                              int64_t ignore_index);
  groups::RowResults (*divergence)(const Tensor& rows, const Tensor& log_target, const groups::Transform&,
                                   const groups::Divergence&, const std::optional<groups::Upstream>&,
                                   const Optional& row_stats, groups::OutputMask, const Optional& grad_rows);
  std::tuple<Tensor, Tensor> (*log_softmax)(const Tensor& rows, const groups::Transform&, at::ScalarType dtype,
                                            const Optional& out);
  std::tuple<Tensor, Tensor> (*log_softmax_backward)(const Tensor& grad_output, const Tensor& rows,
                                                     const groups::Transform&, const Tensor& row_stats,
                                                     groups::OutputMask);
  Tensor (*plif_coefficients)(const Tensor& raw_slope, double bound, double min_slope);
  Tensor (*plif_coefficients_backward)(const Tensor& grad_coefficients, const Tensor& raw_slope, double bound,
                                       double min_slope);
};

namespace cpu {
extern const RowOperators kRowOperators;

Tensor plif_coefficients(const Tensor& raw_slope, double bound, double min_slope);
Tensor plif_coefficients_backward(const Tensor& grad_coefficients, const Tensor& raw_slope, double bound,
                                  double min_slope);

// The upstream gradient of each loss of a mean: 1 / (number of targets that are not ignore_index). [], of type dtype.
Tensor mean_scale(const Tensor& target, int64_t ignore_index, at::ScalarType dtype);
}  // namespace cpu

namespace cuda {
extern const RowOperators kRowOperators;

Tensor plif_coefficients(const Tensor& raw_slope, double bound, double min_slope);
Tensor plif_coefficients_backward(const Tensor& grad_coefficients, const Tensor& raw_slope, double bound,
                                  double min_slope);

// Multiplies contiguous memory by a number on its device. If the number is 1, no element is read or written.
void scale_(const Tensor& tensor, const Tensor& factor);

// The plan for losses of such rows (plan.h), in words.
std::string describe_plan(const Tensor& rows, std::string_view transform, int64_t size, bool gradient,
                          bool coefficients);
}  // namespace cuda

}  // namespace monosoftmax
