// Checks of the arguments of row operators, for every backend.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "row_operators.h"
#include "transforms/registry.h"

namespace monosoftmax {

// Where the tensors of a backend lie.
struct Memory {
  bool (*is_ours)(const Tensor&);
  const char* place;
};

inline void check_rows(const Memory& memory, const char* name, const Tensor& rows) {
  TORCH_CHECK_VALUE(memory.is_ours(rows), "monosoftmax: ", name, " must be on ", memory.place, ", got ", rows.device());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) > 0, "monosoftmax: ", name,
                    " must have shape [N, V] with V > 0, got ", rows.sizes());
  // The strides of no rows mean nothing: contiguous() leaves them alone.
  TORCH_CHECK_VALUE(rows.numel() == 0 || rows.size(1) == 1 || rows.stride(1) == 1, "monosoftmax: ", name,
                    " must have its columns next to each other, got strides ", rows.strides());
}

inline at::ScalarType arithmetic_type(const Tensor& rows) {
  return rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Checks a tensor that comes with rows, and is on the device of the rows.
inline void check_beside(const char* name, const Tensor& tensor, const Tensor& rows, c10::IntArrayRef shape,
                         at::ScalarType type) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "monosoftmax: ", name, " must have shape ", shape, ", got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, "monosoftmax: ", name, " must be ", type, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == rows.device(), "monosoftmax: ", name, " must be on ", rows.device(), ", got ",
                    tensor.device());
}

inline void check_beside(const char* name, const Tensor& tensor, const Tensor& rows, c10::IntArrayRef shape) {
  check_beside(name, tensor, rows, shape, arithmetic_type(rows));
}

// Checks a tensor of the shape of rows and of any type. Returns it with its columns next to each other.
inline Tensor checked_like(const Memory& memory, const char* name, const Tensor& tensor, const Tensor& rows) {
  check_beside(name, tensor, rows, rows.sizes(), tensor.scalar_type());
  Tensor result = tensor.stride(1) == 1 ? tensor : tensor.contiguous();
  check_rows(memory, name, result);
  return result;
}

// Checks the arguments of a transform. Returns the shape of its coefficients.
inline TransformShape check_transform(const groups::Transform& transform, const Tensor& rows) {
  const auto& [coefficients, name, constants, inner, temperature] = transform;
  TransformShape shape{};
  TORCH_CHECK_VALUE(find_transform(name, &shape), "monosoftmax: unknown transform \"", name, "\"");
  const bool fits = coefficients.dim() == (shape.table_rows > 0 ? 2 : 1) && shape.smallest <= coefficients.size(-1) &&
                    coefficients.size(-1) <= shape.largest &&
                    (shape.table_rows == 0 || coefficients.size(0) == shape.table_rows);
  TORCH_CHECK_VALUE(fits, "monosoftmax: coefficients of shape ", coefficients.sizes(), " do not fit transform \"", name,
                    "\"");
  check_beside("coefficients", coefficients, rows, coefficients.sizes());
  TORCH_CHECK_VALUE(name != "plif" || constants.size() == 3, "monosoftmax: plif takes 3 constants");
  TORCH_CHECK_VALUE(name != "monotonic_mlp" || coefficients.size(-1) % 3 == 1,
                    "monosoftmax: monotonic_mlp takes 3H + 1 coefficients");
  TORCH_CHECK_VALUE(inner.empty() || (inner.size() == 2 && inner[0] > 0 && inner[1] >= 0),
                    "monosoftmax: inner must be empty, or a scale > 0 and a cap >= 0");
  if (temperature.has_value()) check_beside("temperature", *temperature, rows, {});
  return shape;
}

inline void check_weight(const Optional& weight, const Tensor& rows) {
  if (weight.has_value()) check_beside("weight", *weight, rows, {rows.size(1)});
}

inline void check_indices(const Tensor& target, const Tensor& rows) {
  check_beside("target", target, rows, {rows.size(0)}, at::kLong);
}

// An upstream gradient of shape [] is one for all losses. It is called scale, since it multiplies their sum.
inline void check_upstream(const std::optional<groups::Upstream>& upstream, const Tensor& rows,
                           groups::OutputMask mask) {
  TORCH_CHECK_VALUE(upstream.has_value() || !mask.any(), "monosoftmax: gradients need a scale");
  if (!upstream.has_value()) return;
  const auto& [loss, lse, factor, entropy] = *upstream;
  if (loss.has_value() && loss->dim() == 0) check_beside("scale", *loss, rows, {});
  if (loss.has_value() && loss->dim() > 0) check_beside("grad_loss", *loss, rows, {rows.size(0)});
  if (lse.has_value()) check_beside("grad_lse", *lse, rows, {rows.size(0)});
  if (factor.has_value()) check_beside("factor", *factor, rows, {});
  if (entropy.has_value()) check_beside("grad_entropy", *entropy, rows, {rows.size(0)});
}

// `given` receives the gradient of rows. Without it, the gradient is written into new memory.
inline void check_grad_rows(const Memory& memory, const Optional& given, const Tensor& rows, groups::OutputMask mask) {
  if (!given.has_value()) return;
  TORCH_CHECK_VALUE(mask.rows, "monosoftmax: grad_rows is given, and the gradient of rows is not asked for");
  check_beside("grad_rows", *given, rows, rows.sizes(), rows.scalar_type());
  check_rows(memory, "grad_rows", *given);
}

// Memory for a result of the shape of rows: `given`, or new memory.
inline Tensor output_for(const Memory& memory, const Optional& given, const Tensor& rows, at::ScalarType type) {
  if (!given.has_value()) return at::empty(rows.sizes(), rows.options().dtype(type));
  check_beside("out", *given, rows, rows.sizes(), type);
  check_rows(memory, "out", *given);
  return *given;
}

inline Tensor nothing_like(const Tensor& tensor) { return at::empty({0}, tensor.options()); }

inline Optional contiguous(const Optional& tensor) {
  return tensor.has_value() ? Optional(tensor->contiguous()) : std::nullopt;
}

template <class S>
const S* data_of(const Optional& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<S>() : nullptr;
}

// Checks the raw slopes of a PLIF, [K].
inline void check_raw_slope(const Memory& memory, const Tensor& raw_slope, double bound) {
  TORCH_CHECK_VALUE(memory.is_ours(raw_slope), "monosoftmax: raw_slope must be on ", memory.place, ", got ",
                    raw_slope.device());
  TransformShape shape{};
  find_transform("plif", &shape);
  TORCH_CHECK_VALUE(raw_slope.dim() == 1 && shape.smallest <= raw_slope.size(0) && raw_slope.size(0) <= shape.largest,
                    "monosoftmax: raw_slope must have shape [K] with K from ", shape.smallest, " to ", shape.largest,
                    ", got ", raw_slope.sizes());
  TORCH_CHECK_VALUE(bound > 0, "monosoftmax: bound must be positive, got ", bound);
}

// Memory for the losses of rows. With row_stats the losses have been computed already, and need no memory.
inline groups::RowResults room_for_losses(const Tensor& rows, int64_t numbers_in_stats, const Optional& row_stats) {
  const auto type = rows.options().dtype(arithmetic_type(rows));
  if (row_stats.has_value()) check_beside("row_stats", *row_stats, rows, {numbers_in_stats, rows.size(0)});
  const int64_t count = row_stats.has_value() ? 0 : rows.size(0);
  return {at::empty({count}, type), at::empty({count}, type),
          row_stats.has_value() ? at::empty({0}, type) : at::empty({numbers_in_stats, count}, type), Tensor(),
          Tensor()};
}

inline groups::TokenStatistics room_for_statistics(const Tensor& rows) {
  const auto empty = [&](at::ScalarType type) { return at::empty({rows.size(0)}, rows.options().dtype(type)); };
  const at::ScalarType type = arithmetic_type(rows);
  return {empty(type), empty(type),      empty(at::kLong),
          empty(type), empty(at::kLong), at::empty({3, rows.size(0)}, rows.options().dtype(type))};
}

// The divergences of monosoftmax/row_kernels.py.
enum class Divergence { kForwardKl, kReverseKl, kJsd };

inline Divergence divergence_of(const groups::Divergence& given) {
  const auto& [kind, beta] = given;
  if (kind == "forward_kl") return Divergence::kForwardKl;
  if (kind == "reverse_kl") return Divergence::kReverseKl;
  TORCH_CHECK_VALUE(kind == "jsd", "monosoftmax: kind must be forward_kl, reverse_kl or jsd, got \"", kind, "\"");
  TORCH_CHECK_VALUE(0 < beta && beta < 1, "monosoftmax: beta must be between 0 and 1, got ", beta);
  return Divergence::kJsd;
}

}  // namespace monosoftmax
