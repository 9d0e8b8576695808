// The operators of the cpu backend that take no rows of logits.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softplus_backward.h>

#include <algorithm>

#include "../plif_grid.h"
#include "arguments.h"

namespace monosoftmax::cpu {
namespace {

// The slopes of a PLIF, in the type of its raw slopes. Each operation is rounded as in PyTorch.
template <class S>
struct Slopes {
  const S* softplus;
  S least, scale;

  Slopes(const Tensor& softplus_of_raw, double min_slope)
      : softplus(softplus_of_raw.const_data_ptr<S>()),
        least(static_cast<S>(min_slope)),
        scale(static_cast<S>(1 - min_slope)) {}
  S unclamped(int64_t k) const { return least + scale * softplus[k]; }
  S operator()(int64_t k) const {
    const S slope = unclamped(k);
    return slope > S(kMostSlope) ? S(kMostSlope) : slope;
  }
};

// Adds up the rises of the pieces outwards from 0, in the order of cumsum and in double. So f is continuous up to the
// rounding of float32.
template <class S>
void fill_coefficients(const Slopes<S>& slopes, const PlifGrid& grid, S* coefficients) {
  S *const slope = coefficients, *const value = coefficients + grid.pieces;
  for (int64_t k = 0; k < grid.pieces; ++k) slope[k] = slopes(k);
  const auto rise = [&](int64_t k) { return static_cast<double>(slope[k]) * grid.width; };
  const double at_centre = -static_cast<double>(slope[grid.centre]) * grid.inside;
  value[grid.centre] = static_cast<S>(at_centre);
  double sum = 0;
  for (int64_t k = grid.centre - 1; k >= 0; --k) value[k] = static_cast<S>(at_centre - (sum += rise(k)));
  sum = 0;
  for (int64_t k = grid.centre; k + 1 < grid.pieces; ++k) value[k + 1] = static_cast<S>(at_centre + (sum += rise(k)));
}

// Writes the gradient of softplus(raw_slope). The value at a knot depends on every slope between the knot and 0. So the
// gradient of a slope adds up the gradients of all values beyond it.
template <class S>
void differentiate_coefficients(const Slopes<S>& slopes, const PlifGrid& grid, const S* grad_coefficients,
                                S* grad_softplus) {
  const S *const of_slope = grad_coefficients, *const of_value = grad_coefficients + grid.pieces;
  const auto write = [&](int64_t k, S of_slope_alone, double of_rise) {
    const S gradient = of_slope_alone + static_cast<S>(of_rise * grid.width);
    grad_softplus[k] = slopes.unclamped(k) <= S(kMostSlope) ? gradient * slopes.scale : S(0);
  };
  double left = 0, right = 0;
  for (int64_t k = 0; k < grid.centre; ++k) write(k, of_slope[k], left -= of_value[k]);
  for (int64_t k = grid.pieces - 1; k > grid.centre; --k) {
    write(k, of_slope[k], right);
    right += of_value[k];
  }
  const double of_centre = (of_value[grid.centre] + right) - left;
  write(grid.centre, of_slope[grid.centre] + static_cast<S>(-(of_centre * grid.inside)), right);
}

template <class Visitor>
void with_type(const Tensor& raw_slope, Visitor&& visitor) {
  if (raw_slope.scalar_type() == at::kFloat) return visitor(float{});
  TORCH_CHECK_TYPE(raw_slope.scalar_type() == at::kDouble, "monosoftmax: raw_slope must be Float or Double, got ",
                   raw_slope.scalar_type());
  visitor(double{});
}

}  // namespace

Tensor plif_coefficients(const Tensor& raw_slope, double bound, double min_slope) {
  check_raw_slope(kMemory, raw_slope, bound);
  Tensor coefficients = at::empty({2, raw_slope.size(0)}, raw_slope.options());
  with_type(raw_slope, [&](auto zero) {
    using S = decltype(zero);
    const Tensor softplus = at::softplus(raw_slope).contiguous();
    fill_coefficients(Slopes<S>(softplus, min_slope), plif_grid(raw_slope.size(0), bound),
                      coefficients.mutable_data_ptr<S>());
  });
  return coefficients;
}

Tensor plif_coefficients_backward(const Tensor& grad_coefficients, const Tensor& raw_slope, double bound,
                                  double min_slope) {
  check_raw_slope(kMemory, raw_slope, bound);
  check_beside("grad_coefficients", grad_coefficients, raw_slope, {2, raw_slope.size(0)}, raw_slope.scalar_type());
  Tensor grad_softplus = at::empty(raw_slope.sizes(), raw_slope.options());
  with_type(raw_slope, [&](auto zero) {
    using S = decltype(zero);
    const Tensor softplus = at::softplus(raw_slope).contiguous(), gradient = grad_coefficients.contiguous();
    differentiate_coefficients(Slopes<S>(softplus, min_slope), plif_grid(raw_slope.size(0), bound),
                               gradient.const_data_ptr<S>(), grad_softplus.mutable_data_ptr<S>());
  });
  return at::softplus_backward(grad_softplus, raw_slope, 1, 20);
}

Tensor mean_scale(const Tensor& target, int64_t ignore_index, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "monosoftmax: target must be Long, got ", target.scalar_type());
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "monosoftmax: a mean is of type Float or Double, got ",
                   dtype);
  TORCH_CHECK_VALUE(target.is_cpu(), "monosoftmax: target must be on the CPU, got ", target.device());
  const Tensor targets = target.contiguous();
  const int64_t* each = targets.const_data_ptr<int64_t>();
  const int64_t counted = targets.numel() - std::count(each, each + targets.numel(), ignore_index);
  Tensor scale = at::empty({}, target.options().dtype(dtype));
  if (dtype == at::kFloat) {
    *scale.mutable_data_ptr<float>() = 1 / static_cast<float>(counted);
  } else {
    *scale.mutable_data_ptr<double>() = 1 / static_cast<double>(counted);
  }
  return scale;
}

}  // namespace monosoftmax::cpu
