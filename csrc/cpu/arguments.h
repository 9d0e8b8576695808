// What the operators of the cpu backend are given, checked and as the kernels take it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../transforms/registry.h"
#include "instruction_set.h"

namespace monosoftmax::cpu {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Constants = c10::ArrayRef<double>;

inline Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Element::kFloat;
    case at::kDouble: return Element::kDouble;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kHalf;
    default: TORCH_CHECK_TYPE(false, "monosoftmax: ", type, " is not supported");
  }
}

inline at::ScalarType arithmetic_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls visitor(S{}, kernels of S) for the arithmetic type S of a call.
template <class Visitor>
void with_kernels(const Tensor& input, Visitor&& visitor) {
  if (input.scalar_type() == at::kDouble) {
    visitor(double{}, instruction_set().double_kernels);
  } else {
    visitor(float{}, instruction_set().float_kernels);
  }
}

inline void check_rows(const char* name, const Tensor& rows) {
  TORCH_CHECK_VALUE(rows.device().is_cpu(), "monosoftmax: ", name, " must be on the CPU, got ", rows.device());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) > 0, "monosoftmax: ", name,
                    " must have shape [N, V] with V > 0, got ", rows.sizes());
  TORCH_CHECK_VALUE(rows.size(1) == 1 || rows.stride(1) == 1, "monosoftmax: ", name,
                    " must have its columns next to each other, got strides ", rows.strides());
  element_of(rows.scalar_type());
}

inline void check_arithmetic(const char* name, const Tensor& tensor, const Tensor& input, c10::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "monosoftmax: ", name, " must have shape ", shape, ", got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == arithmetic_type(input), "monosoftmax: ", name, " must be ",
                   arithmetic_type(input), ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), "monosoftmax: ", name, " must be on the CPU");
}

// Holds what the kernels point into while they run.
class TransformArguments {
 public:
  TransformArguments(const Tensor& input, const Tensor& coefficients, c10::string_view name, Constants constants)
      : constants_(constants), name_(name.data(), name.size()), size_(coefficients.size(-1)) {
    TORCH_CHECK_VALUE(find_transform(name_, &shape_), "monosoftmax: unknown transform \"", name_, "\"");
    TORCH_CHECK_VALUE(
        coefficients.dim() == (shape_.table_rows > 0 ? 2 : 1) && shape_.smallest <= size_ && size_ <= shape_.largest &&
            (shape_.table_rows == 0 || coefficients.size(0) == shape_.table_rows),
        "monosoftmax: coefficients of shape ", coefficients.sizes(), " do not fit transform \"", name_, "\"");
    check_arithmetic("coefficients", coefficients, input, coefficients.sizes());
    TORCH_CHECK_VALUE(name_ != "plif" || constants.size() == 3, "monosoftmax: plif takes 3 constants");
    TORCH_CHECK_VALUE(name_ != "monotonic_mlp" || size_ % 3 == 1,
                      "monosoftmax: monotonic_mlp takes 3H + 1 "
                      "coefficients");
    if (shape_.table_rows == 0) {
      coefficients_ = coefficients.contiguous();
    } else {
      coefficients_ = at::zeros({size_, table_stride(shape_.table_rows)}, coefficients.options());
      coefficients_.narrow(1, 0, shape_.table_rows).copy_(coefficients.t());
      with_kernels(input, [&](auto zero, const auto&) {
        complete_table(name_, coefficients_.mutable_data_ptr<decltype(zero)>(), size_, constants_.data());
      });
    }
  }

  template <class S>
  Transform<S> view() const {
    return {name_, coefficients_.const_data_ptr<S>(), size_, constants_.data()};
  }
  // As the kernels see them: of a table, [pieces, stride].
  const Tensor& coefficients() const { return coefficients_; }
  int table_rows() const { return shape_.table_rows; }

 private:
  Tensor coefficients_;
  Constants constants_;
  std::string_view name_;
  int64_t size_;
  TransformShape shape_{};
};

inline Rows<const void*> rows_of(const Tensor& rows) {
  return {rows.const_data_ptr(), element_of(rows.scalar_type()), rows.stride(0)};
}

inline Rows<void*> writable_rows_of(Tensor& rows) {
  return {rows.mutable_data_ptr(), element_of(rows.scalar_type()), rows.stride(0)};
}

inline void check_scale(const Optional& scale, const Tensor& input, bool needed) {
  if (scale.has_value()) check_arithmetic("scale", *scale, input, {});
  TORCH_CHECK_VALUE(scale.has_value() || !needed, "monosoftmax: gradients need a scale");
}

// The options of a loss that do not depend on what its target is.
class LossArguments {
 public:
  LossArguments(const Tensor& input, const Optional& weight, double label_smoothing, double z_loss)
      : classes_(input.size(1)), label_smoothing_(label_smoothing), z_loss_(z_loss) {
    if (!weight.has_value()) return;
    check_arithmetic("weight", *weight, input, {classes_});
    weight_ = weight->contiguous();
  }

 protected:
  template <class S>
  const S* weight() const {
    return weight_.defined() ? weight_.const_data_ptr<S>() : nullptr;
  }

  Tensor weight_;
  int64_t classes_;
  double label_smoothing_, z_loss_;
};

// The target and the options of a loss of class indices.
class IndexArguments : public LossArguments {
 public:
  static constexpr int64_t kStats = 2;

  IndexArguments(const Tensor& input, const Tensor& target, const Optional& weight, int64_t ignore_index,
                 double label_smoothing, double z_loss, bool lse_of_ignored)
      : LossArguments(input, weight, label_smoothing, z_loss),
        target_(target.contiguous()),
        ignore_index_(ignore_index),
        weight_sum_(static_cast<double>(classes_)),
        lse_of_ignored_(lse_of_ignored) {
    TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "monosoftmax: target must be int64, got ",
                     target.scalar_type());
    TORCH_CHECK_VALUE(target.device().is_cpu() && target.dim() == 1 && target.size(0) == input.size(0),
                      "monosoftmax: target must have shape [", input.size(0), "] on the CPU, got ", target.sizes());
    if (weight_.defined() && label_smoothing > 0) weight_sum_ = weight_.sum(at::kDouble).item<double>();
    const int64_t* targets = target_.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < target_.size(0); ++row) {
      TORCH_CHECK_INDEX(targets[row] == ignore_index || (0 <= targets[row] && targets[row] < classes_), "target ",
                        targets[row], " (row ", row, ") is out of bounds for ", classes_,
                        " classes (ignore_index=", ignore_index, ")");
    }
  }

  template <class S>
  IndexTarget<S> view() const {
    return {target_.const_data_ptr<int64_t>(),
            {classes_, ignore_index_, label_smoothing_, z_loss_, weight<S>(), weight_sum_},
            lse_of_ignored_};
  }

 private:
  Tensor target_;
  int64_t ignore_index_;
  double weight_sum_;
  bool lse_of_ignored_;
};

// The target and the options of a loss of class probabilities.
class ProbabilityArguments : public LossArguments {
 public:
  static constexpr int64_t kStats = 3;

  ProbabilityArguments(const Tensor& input, const Tensor& target, const Optional& weight, double label_smoothing,
                       double z_loss)
      : LossArguments(input, weight, label_smoothing, z_loss) {
    TORCH_CHECK_VALUE(target.sizes() == input.sizes(), "monosoftmax: target must have shape ", input.sizes(), ", got ",
                      target.sizes());
    target_ = target.stride(1) == 1 ? target : target.contiguous();
    check_rows("target", target_);
  }

  template <class S>
  ProbabilityTarget<S> view() const {
    return {rows_of(target_), {classes_, label_smoothing_, z_loss_, weight<S>()}};
  }

 private:
  Tensor target_;
};

template <class S>
RowStats<S> stats_of(Tensor& row_stats) {
  S* data = row_stats.mutable_data_ptr<S>();
  return {data, data + row_stats.size(1), row_stats.size(0) == 2 ? nullptr : data + 2 * row_stats.size(1)};
}

template <class S>
RowStats<const S> const_stats_of(const Tensor& row_stats) {
  const S* data = row_stats.const_data_ptr<S>();
  return {data, data + row_stats.size(1), row_stats.size(0) == 2 ? nullptr : data + 2 * row_stats.size(1)};
}

// The gradient of rows: new memory, whose pages the kernels are the first to touch. In pages of 2 MiB, where the system
// has them for who asks, that takes a fraction of the time: 4 KiB pages cost as much as the arithmetic.
inline Tensor empty_gradient(const Tensor& input) {
  Tensor gradient = at::empty(input.sizes(), input.options());
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthwhile = 4 << 20;
  if (gradient.nbytes() >= kWorthwhile) {
    const auto begin = (reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr()) + gradient.nbytes()) / kPage * kPage;
    // A refusal leaves small pages, which are slower and as right.
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return gradient;
}

inline Rows<void*> rows_or_none(Tensor* rows, const Tensor& like) {
  return rows == nullptr ? Rows<void*>{nullptr, element_of(like.scalar_type()), 0} : writable_rows_of(*rows);
}

}  // namespace monosoftmax::cpu
