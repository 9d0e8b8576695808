// The operators of the cuda backend that take no rows of logits. They do not wait for the device.
#include "limits.h"

namespace monosoftmax::cuda {
namespace {

// The arguments of a PLIF's kernels, without the results.
PlifArguments plif_arguments(const Tensor& raw_slope, double bound, double min_slope) {
  const int64_t pieces = raw_slope.size(0);
  TORCH_CHECK_VALUE(pieces <= kMostPieces, "monosoftmax: the cuda backend takes up to ", kMostPieces, " pieces, got ",
                    pieces);
  TORCH_CHECK_TYPE(raw_slope.scalar_type() == at::kFloat, "monosoftmax: raw_slope must be Float, got ",
                   raw_slope.scalar_type());
  return {.grid = plif_grid(pieces, bound),
          .min_slope = static_cast<float>(min_slope),
          .scale = static_cast<float>(1 - min_slope),
          .raw_slope = raw_slope.const_data_ptr<float>()};
}

}  // namespace

Tensor plif_coefficients(const Tensor& raw_slope, double bound, double min_slope) {
  check_raw_slope(kMemory, raw_slope, bound);
  const Tensor raw = raw_slope.contiguous();
  PlifArguments arguments = plif_arguments(raw, bound, min_slope);
  Tensor coefficients = at::empty({2, raw.size(0)}, raw.options());
  arguments.coefficients = coefficients.mutable_data_ptr<float>();
  const OnDeviceOf on(raw);
  launch_plif_coefficients(arguments, on.stream());
  return coefficients;
}

Tensor plif_coefficients_backward(const Tensor& grad_coefficients, const Tensor& raw_slope, double bound,
                                  double min_slope) {
  check_raw_slope(kMemory, raw_slope, bound);
  check_beside("grad_coefficients", grad_coefficients, raw_slope, {2, raw_slope.size(0)}, raw_slope.scalar_type());
  const Tensor raw = raw_slope.contiguous(), gradient = grad_coefficients.contiguous();
  PlifArguments arguments = plif_arguments(raw, bound, min_slope);
  Tensor grad_raw_slope = at::empty(raw.sizes(), raw.options());
  arguments.grad_coefficients = gradient.const_data_ptr<float>();
  arguments.grad_raw_slope = grad_raw_slope.mutable_data_ptr<float>();
  const OnDeviceOf on(raw);
  launch_plif_coefficients_backward(arguments, on.stream());
  return grad_raw_slope;
}

}  // namespace monosoftmax::cuda
