// Turns the arguments of the operators of the cpu backend into arguments of its kernels.
#pragma once

#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <limits>

#include "../checked.h"
#include "instruction_set.h"

namespace monosoftmax::cpu {

inline Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Element::kFloat;
    case at::kDouble: return Element::kDouble;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kHalf;
    default: TORCH_CHECK_TYPE(false, "monosoftmax: ", type, " is not supported");
  }
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

inline const Memory kMemory{[](const Tensor& tensor) { return tensor.is_cpu(); }, "the CPU"};

inline void check_rows(const char* name, const Tensor& rows) {
  monosoftmax::check_rows(kMemory, name, rows);
  element_of(rows.scalar_type());
}

// The kernels' arguments for a transform. Holds the memory that these arguments point into.
class TransformArguments {
 public:
  TransformArguments(const groups::Transform& transform, const Tensor& rows)
      : name_(transform.name),
        constants_(transform.constants.data()),
        table_rows_(check_transform(transform, rows).table_rows),
        size_(transform.coefficients.size(-1)),
        given_(transform.coefficients),
        inner_(transform.inner),
        temperature_(transform.temperature) {
    if (table_rows_ == 0) {
      coefficients_ = given_.contiguous();
      return;
    }
    coefficients_ = at::empty({size_, table_stride(table_rows_)}, given_.options());
    with_kernels(rows, [&](auto zero, const auto&) { fill_table<decltype(zero)>(); });
  }

  template <class S>
  Transform<S> view() const {
    const S temperature = temperature_.has_value() ? *temperature_->const_data_ptr<S>() : S(1);
    return {.name = name_,
            .coefficients = coefficients_.const_data_ptr<S>(),
            .size = size_,
            .constants = constants_,
            .inner = inner_.empty() ? InnerNumbers<S>{} : InnerNumbers<S>{S(inner_[0]), S(inner_[1])},
            .inverse_temperature = temperature > 0 ? 1 / temperature : std::numeric_limits<S>::quiet_NaN()};
  }
  const Tensor& given() const { return given_; }
  // In the layout of the kernels: a table is [pieces, stride].
  const Tensor& coefficients() const { return coefficients_; }
  int table_rows() const { return table_rows_; }

 private:
  // Copies [rows, pieces] to [pieces, stride]. If a stride is longer than the number of rows, zeros fill the rest.
  template <class S>
  void fill_table() {
    const S* from = given_.const_data_ptr<S>();
    S* to = coefficients_.mutable_data_ptr<S>();
    const int64_t stride = table_stride(table_rows_), to_row = given_.stride(0), to_piece = given_.stride(1);
    for (int64_t k = 0; k < size_; ++k) {
      for (int64_t r = 0; r < stride; ++r) {
        to[k * stride + r] = r < table_rows_ ? from[r * to_row + k * to_piece] : S(0);
      }
    }
    complete_table(name_, to, size_, constants_);
  }

  std::string_view name_;
  const double* constants_;
  int table_rows_;
  int64_t size_;
  const Tensor& given_;
  c10::ArrayRef<double> inner_;
  const Optional& temperature_;
  Tensor coefficients_;
};

inline Rows<const void*> rows_of(const Tensor& rows) {
  return {rows.const_data_ptr(), element_of(rows.scalar_type()), rows.stride(0)};
}

// Data is null if the kernels should write nothing.
inline Rows<void*> rows_if(bool written, Tensor& rows) {
  return written ? Rows<void*>{rows.mutable_data_ptr(), element_of(rows.scalar_type()), rows.stride(0)}
                 : Rows<void*>{nullptr, element_of(rows.scalar_type()), 0};
}

// The options of a loss for both kinds of targets.
class LossArguments {
 public:
  LossArguments(const Tensor& rows, const groups::LossOptions& options)
      : classes_(rows.size(1)), label_smoothing_(options.label_smoothing), z_loss_(options.z_loss) {
    check_weight(options.weight, rows);
    weight_ = contiguous(options.weight);
  }

 protected:
  Optional weight_;
  int64_t classes_;
  double label_smoothing_, z_loss_;
};

// The target and the options of a loss of class indices.
class IndexArguments : public LossArguments {
 public:
  // The numbers of a row_stats that the loss fills, and the most that it takes: token_statistics finds a third one.
  static constexpr int64_t kStats = 2, kMostStats = 3;

  IndexArguments(const Tensor& rows, const Tensor& target, const groups::LossOptions& options)
      : LossArguments(rows, options),
        target_(target.contiguous()),
        ignore_index_(options.ignore_index),
        weight_sum_(static_cast<double>(classes_)),
        lse_of_ignored_(options.return_lse) {
    check_indices(target, rows);
    if (weight_.has_value() && label_smoothing_ > 0) weight_sum_ = weight_->sum(at::kDouble).item<double>();
    const int64_t* targets = target_.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < target_.size(0); ++row) {
      TORCH_CHECK_INDEX(targets[row] == ignore_index_ || (0 <= targets[row] && targets[row] < classes_), "target ",
                        targets[row], " (row ", row, ") is out of bounds for ", classes_,
                        " classes (ignore_index=", ignore_index_, ")");
    }
  }

  template <class S>
  IndexTarget<S> view() const {
    return {target_.const_data_ptr<int64_t>(),
            {classes_, ignore_index_, label_smoothing_, z_loss_, data_of<S>(weight_), weight_sum_},
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
  static constexpr int64_t kStats = 3, kMostStats = 3;

  ProbabilityArguments(const Tensor& rows, const Tensor& target, const groups::LossOptions& options)
      : LossArguments(rows, options), target_(checked_like(kMemory, "target", target, rows)) {}

  template <class S>
  ProbabilityTarget<S> view() const {
    return {rows_of(target_), {classes_, label_smoothing_, z_loss_, data_of<S>(weight_)}};
  }

 private:
  Tensor target_;
};

// The target of a divergence.
class DivergenceArguments {
 public:
  static constexpr int64_t kStats = 3;

  DivergenceArguments(const Tensor& rows, const Tensor& log_target, const groups::Divergence& divergence)
      : kind_(divergence_of(divergence)),
        beta_(divergence.beta),
        log_q_(checked_like(kMemory, "log_target", log_target, rows)) {
    element_of(log_q_.scalar_type());
  }

  const Tensor& log_q() const { return log_q_; }
  double beta() const { return beta_; }
  template <class S>
  const DivergenceTiles<S>& tiles(const RowKernels<S>& kernels) const {
    switch (kind_) {
      case Divergence::kForwardKl: return kernels.forward_kl;
      case Divergence::kReverseKl: return kernels.reverse_kl;
      default: return kernels.jsd;
    }
  }

 private:
  Divergence kind_;
  double beta_;
  Tensor log_q_;
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

// New memory for the gradient of rows. The kernels are the first to touch its pages. With pages of 4 KiB this costs as
// much as the arithmetic; pages of 2 MiB, which some systems give on request, cost a fraction of it.
inline Tensor empty_gradient(const Tensor& input) {
  Tensor gradient = at::empty(input.sizes(), input.options());
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthwhile = 4 << 20;
  if (gradient.nbytes() >= kWorthwhile) {
    const auto begin = (reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr()) + gradient.nbytes()) / kPage * kPage;
    // The call may fail: small pages are slower, but the result is the same.
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return gradient;
}

inline Tensor gradient_if(bool wanted, const Tensor& rows) {
  return wanted ? empty_gradient(rows) : nothing_like(rows);
}

}  // namespace monosoftmax::cpu
