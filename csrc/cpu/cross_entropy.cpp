// The operators of the cpu backend: checks, outputs, and the division of rows among torch's threads. The schemas are in
// monosoftmax/ops.py, the kernels in row_kernels_impl.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "../transforms/registry.h"
#include "instruction_set.h"

namespace monosoftmax::cpu {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Constants = c10::ArrayRef<double>;

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Element::kFloat;
    case at::kDouble: return Element::kDouble;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kHalf;
    default: TORCH_CHECK_TYPE(false, "monosoftmax: ", type, " is not supported");
  }
}

at::ScalarType arithmetic_type(const Tensor& input) {
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

void check_rows(const char* name, const Tensor& rows) {
  TORCH_CHECK_VALUE(rows.device().is_cpu(), "monosoftmax: ", name, " must be on the CPU, got ", rows.device());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) > 0, "monosoftmax: ", name,
                    " must have shape [N, V] with V > 0, got ", rows.sizes());
  TORCH_CHECK_VALUE(rows.size(1) == 1 || rows.stride(1) == 1, "monosoftmax: ", name,
                    " must have its columns next to each other, got strides ", rows.strides());
  element_of(rows.scalar_type());
}

void check_arithmetic(const char* name, const Tensor& tensor, const Tensor& input, c10::IntArrayRef shape) {
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
      : coefficients_(coefficients.contiguous()), constants_(constants), name_(name.data(), name.size()) {
    TORCH_CHECK_VALUE(find_transform(name_, &shape_), "monosoftmax: unknown transform \"", name_, "\"");
    TORCH_CHECK_VALUE(
        coefficients.dim() == (shape_.table_rows > 0 ? 2 : 1) && shape_.smallest <= size() &&
            size() <= shape_.largest && (shape_.table_rows == 0 || coefficients.size(0) == shape_.table_rows),
        "monosoftmax: coefficients of shape ", coefficients.sizes(), " do not fit transform \"", name_, "\"");
    check_arithmetic("coefficients", coefficients, input, coefficients.sizes());
    TORCH_CHECK_VALUE(name_ != "plif" || constants.size() == 3, "monosoftmax: plif takes 3 constants");
    TORCH_CHECK_VALUE(name_ != "monotonic_mlp" || size() % 3 == 1,
                      "monosoftmax: monotonic_mlp takes 3H + 1 "
                      "coefficients");
  }

  template <class S>
  Transform<S> view() const {
    return {name_, coefficients_.const_data_ptr<S>(), size(), constants_.data()};
  }
  int64_t size() const { return coefficients_.size(-1); }
  int table_rows() const { return shape_.table_rows; }

 private:
  Tensor coefficients_;
  Constants constants_;
  std::string_view name_;
  TransformShape shape_{};
};

Rows<const void*> rows_of(const Tensor& rows) {
  return {rows.const_data_ptr(), element_of(rows.scalar_type()), rows.stride(0)};
}

Rows<void*> writable_rows_of(Tensor& rows, bool needed) {
  return {needed ? rows.mutable_data_ptr() : nullptr, element_of(rows.scalar_type()), needed ? rows.stride(0) : 0};
}

// Rows are divided into one contiguous share a thread, whatever the grain of the work: sums over the shares are then
// the same in every run with as many threads.
int64_t shares_of(int64_t rows) { return std::min<int64_t>(rows, at::get_num_threads()); }

template <class Work>
void for_each_share(int64_t rows, Work&& work) {
  const int64_t shares = shares_of(rows);
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share) {
      work(share, rows * share / shares, rows * (share + 1) / shares);
    }
  });
}

// The double precision sums of coefficient gradients, one set a share.
class CoefficientSums {
 public:
  CoefficientSums(const TransformArguments& transform, int64_t rows, bool needed)
      : table_rows_(transform.table_rows()), width_(std::max(table_rows_, 1)), size_(transform.size()) {
    // Four copies let four logits of one piece be added at once; a large table has few such conflicts, and copies of it
    // would not fit the cache.
    if (table_rows_ > 0 && size_ <= 1024) copies_ = 4;
    if (needed && size_ > 0) sums_ = at::zeros({shares_of(rows), copies_, size_, width_}, at::kDouble);
  }
  CoefficientGradient share(int64_t index) {
    if (!sums_.defined()) return {nullptr, 0};
    return {sums_.mutable_data_ptr<double>() + index * copies_ * size_ * width_, static_cast<int>(copies_)};
  }
  Tensor total(const Tensor& coefficients, bool needed) const {
    if (!needed) return at::empty({0}, coefficients.options());
    if (!sums_.defined()) return at::empty_like(coefficients);
    const Tensor total = sums_.sum(at::IntArrayRef{0, 1}).t().to(coefficients.scalar_type());
    return total.reshape(coefficients.sizes()).contiguous();
  }

 private:
  int table_rows_;
  int64_t width_, size_, copies_ = 1;
  Tensor sums_;
};

struct LossArguments {
  Tensor target;
  Optional weight;
  int64_t classes, ignore_index;
  double label_smoothing, z_loss, weight_sum;

  LossArguments(const Tensor& input, const Tensor& target_, const Optional& weight_, int64_t ignore_index_,
                double label_smoothing_, double z_loss_)
      : target(target_.contiguous()),
        classes(input.size(1)),
        ignore_index(ignore_index_),
        label_smoothing(label_smoothing_),
        z_loss(z_loss_),
        weight_sum(static_cast<double>(classes)) {
    TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "monosoftmax: target must be int64, got ",
                     target.scalar_type());
    TORCH_CHECK_VALUE(target.device().is_cpu() && target.dim() == 1 && target.size(0) == input.size(0),
                      "monosoftmax: target must have shape [", input.size(0), "] on the CPU, got ", target.sizes());
    if (weight_.has_value()) {
      check_arithmetic("weight", *weight_, input, {classes});
      weight = weight_->contiguous();
      if (label_smoothing > 0) weight_sum = weight->sum(at::kDouble).item<double>();
    }
    const int64_t* targets = target.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < target.size(0); ++row) {
      TORCH_CHECK_INDEX(targets[row] == ignore_index || (0 <= targets[row] && targets[row] < classes), "target ",
                        targets[row], " (row ", row, ") is out of bounds for ", classes,
                        " classes (ignore_index=", ignore_index, ")");
    }
  }

  template <class S>
  LossOptions<S> view() const {
    return {
        classes,   ignore_index, label_smoothing, z_loss, weight.has_value() ? weight->const_data_ptr<S>() : nullptr,
        weight_sum};
  }
};

template <class S>
RowStats<S> stats_of(Tensor& row_stats) {
  S* data = row_stats.mutable_data_ptr<S>();
  return {data, data + row_stats.size(1)};
}

template <class S>
RowStats<const S> const_stats_of(const Tensor& row_stats) {
  const S* data = row_stats.const_data_ptr<S>();
  return {data, data + row_stats.size(1)};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& input, const Tensor& target, const Optional& weight,
                                                 const Tensor& coefficients, c10::string_view transform,
                                                 Constants constants, int64_t ignore_index, double label_smoothing,
                                                 double z_loss, bool return_lse) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const LossArguments options(input, target, weight, ignore_index, label_smoothing, z_loss);
  const int64_t rows = input.size(0);
  const auto type = input.options().dtype(arithmetic_type(input));
  Tensor loss = at::empty({rows}, type), lse = at::empty({rows}, type), row_stats = at::empty({2, rows}, type);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const CrossEntropyCall<S> call{rows_of(input),
                                   options.target.const_data_ptr<int64_t>(),
                                   arguments.view<S>(),
                                   options.view<S>(),
                                   return_lse,
                                   loss.mutable_data_ptr<S>(),
                                   lse.mutable_data_ptr<S>(),
                                   stats_of<S>(row_stats)};
    for_each_share(rows, [&](int64_t, int64_t begin, int64_t end) { kernels.cross_entropy(call, begin, end); });
  });
  return {loss, lse, row_stats};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Optional& grad_loss, const Optional& grad_lse,
                                                  const Tensor& input, const Tensor& target, const Optional& weight,
                                                  const Tensor& coefficients, c10::string_view transform,
                                                  Constants constants, const Tensor& row_stats, int64_t ignore_index,
                                                  double label_smoothing, double z_loss, bool need_input,
                                                  bool need_coefficients) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const LossArguments options(input, target, weight, ignore_index, label_smoothing, z_loss);
  const int64_t rows = input.size(0);
  check_arithmetic("row_stats", row_stats, input, {2, rows});
  const Tensor stats = row_stats.contiguous();
  Tensor upstream[2];
  const char* names[2] = {"grad_loss", "grad_lse"};
  const Optional* given[2] = {&grad_loss, &grad_lse};
  for (int i = 0; i < 2; ++i) {
    if (!given[i]->has_value()) continue;
    check_arithmetic(names[i], **given[i], input, {rows});
    upstream[i] = (*given[i])->contiguous();
  }
  Tensor grad_input = need_input ? at::empty(input.sizes(), input.options()) : at::empty({0}, input.options());
  CoefficientSums sums(arguments, rows, need_coefficients);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const CrossEntropyBackwardCall<S> call{rows_of(input),
                                           options.target.const_data_ptr<int64_t>(),
                                           arguments.view<S>(),
                                           options.view<S>(),
                                           upstream[0].defined() ? upstream[0].const_data_ptr<S>() : nullptr,
                                           upstream[1].defined() ? upstream[1].const_data_ptr<S>() : nullptr,
                                           const_stats_of<S>(stats),
                                           writable_rows_of(grad_input, need_input)};
    for_each_share(rows, [&](int64_t share, int64_t begin, int64_t end) {
      kernels.cross_entropy_backward(call, sums.share(share), begin, end);
    });
  });
  return {grad_input, sums.total(coefficients, need_coefficients)};
}

std::tuple<Tensor, Tensor> log_softmax(const Tensor& input, const Tensor& coefficients, c10::string_view transform,
                                       Constants constants, at::ScalarType dtype) {
  check_rows("input", input);
  element_of(dtype);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const int64_t rows = input.size(0);
  Tensor output = at::empty(input.sizes(), input.options().dtype(dtype));
  Tensor row_stats = at::empty({2, rows}, input.options().dtype(arithmetic_type(input)));
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const LogSoftmaxCall<S> call{rows_of(input), input.size(1), arguments.view<S>(), writable_rows_of(output, true),
                                 stats_of<S>(row_stats)};
    for_each_share(rows, [&](int64_t, int64_t begin, int64_t end) { kernels.log_softmax(call, begin, end); });
  });
  return {output, row_stats};
}

std::tuple<Tensor, Tensor> log_softmax_backward(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& coefficients, c10::string_view transform,
                                                Constants constants, const Tensor& row_stats, bool need_input,
                                                bool need_coefficients) {
  check_rows("input", input);
  TORCH_CHECK_VALUE(grad_output.sizes() == input.sizes(), "monosoftmax: grad_output must have shape ", input.sizes(),
                    ", got ", grad_output.sizes());
  const Tensor grad = grad_output.stride(1) == 1 ? grad_output : grad_output.contiguous();
  check_rows("grad_output", grad);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const int64_t rows = input.size(0);
  check_arithmetic("row_stats", row_stats, input, {2, rows});
  const Tensor stats = row_stats.contiguous();
  Tensor grad_input = need_input ? at::empty(input.sizes(), input.options()) : at::empty({0}, input.options());
  CoefficientSums sums(arguments, rows, need_coefficients);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const LogSoftmaxBackwardCall<S> call{
        rows_of(grad),       rows_of(input),           input.size(1),
        arguments.view<S>(), const_stats_of<S>(stats), writable_rows_of(grad_input, need_input)};
    for_each_share(rows, [&](int64_t share, int64_t begin, int64_t end) {
      kernels.log_softmax_backward(call, sums.share(share), begin, end);
    });
  });
  return {grad_input, sums.total(coefficients, need_coefficients)};
}

}  // namespace

TORCH_LIBRARY_IMPL(monosoftmax, CPU, m) {
  m.impl("cross_entropy.cpu", &cross_entropy);
  m.impl("cross_entropy_backward.cpu", &cross_entropy_backward);
  m.impl("log_softmax.cpu", &log_softmax);
  m.impl("log_softmax_backward.cpu", &log_softmax_backward);
}

}  // namespace monosoftmax::cpu
