// The operators of the cuda backend: they check, make the results and a plan, and launch (launch.h). Nothing here waits
// for the device, and all is in its current stream: calls can be captured in graphs.
#include <ATen/Context.h>
#include <ATen/DimVector.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <string>

#include "../checked.h"
#include "torch_device.h"

namespace monosoftmax::cuda {
namespace {

// Entries of a table are counted in the last bits of a float (arithmetic.cuh).
constexpr int64_t kMostPieces = 1 << 22;
// Columns are numbered by int.
constexpr int64_t kMostColumns = std::numeric_limits<int>::max() / 2;
const Memory kMemory{&is_ours, "a CUDA device"};

ElementType element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return ElementType::kFloat;
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kHalf: return ElementType::kHalf;
    default:
      TORCH_CHECK_TYPE(false, "monosoftmax: the cuda backend takes float32, bfloat16 and float16, got ",
                       tensor.scalar_type());
  }
}

void check_rows(const char* name, const Tensor& rows) {
  monosoftmax::check_rows(kMemory, name, rows);
  TORCH_CHECK_VALUE(rows.size(1) <= kMostColumns, "monosoftmax: ", name, " has ", rows.size(1),
                    " columns; the cuda backend takes up to ", kMostColumns);
  element_of(rows);
}

const float* data_of(const Optional& tensor) { return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr; }

Optional contiguous(const Optional& tensor) { return tensor.has_value() ? Optional(tensor->contiguous()) : Optional(); }

Tensor gradient_if(bool wanted, const Tensor& rows) {
  return wanted ? at::empty(rows.sizes(), rows.options()) : nothing_like(rows);
}

// The buffers of a call beside its results: the table for look-ups, and the sums for the gradient of the coefficients.
class Buffers {
 public:
  Buffers(const Plan& plan, std::string_view transform, const Tensor& coefficients) {
    if (const int64_t numbers = table_numbers(transform, coefficients.size(-1));
        numbers > 0 && !plan.table_in_shared_memory) {
      table_ = at::empty({numbers}, coefficients.options());
    }
    if (plan.sums == SumsKind::kNone) return;
    at::DimVector sizes(coefficients.sizes());
    sizes.insert(sizes.begin(), plan.sum_sets);
    // Each block writes all of its own; of tables in memory, each warp adds to it.
    const bool added_to = plan.atomic || plan.sums == SumsKind::kWarps;
    const auto type = coefficients.options().dtype(plan.atomic ? at::kDouble : at::kFloat);
    sums_ = added_to ? at::zeros(sizes, type) : at::empty(sizes, type);
  }
  void fill_table(std::string_view transform, TransformArguments& arguments, Stream stream) {
    if (!table_.defined()) return;
    launch_fill_table(transform, arguments, table_.mutable_data_ptr<float>(), stream);
    arguments.table = table_.const_data_ptr<float>();
  }
  SumsArguments sums() {
    if (!sums_.defined()) return {};
    return sums_.scalar_type() == at::kDouble ? SumsArguments{nullptr, sums_.mutable_data_ptr<double>()}
                                              : SumsArguments{sums_.mutable_data_ptr<float>(), nullptr};
  }
  // The second stage.
  Tensor total() const { return sums_.sum(0, false, at::kDouble).to(at::kFloat); }

 private:
  Tensor table_, sums_;
};

template <class Arguments>
auto take_sums(Arguments& arguments, Buffers& buffers) -> decltype(arguments.sums, void()) {
  arguments.sums = buffers.sums();
}
void take_sums(LogSoftmaxArguments&, Buffers&) {}
void take_sums(TokenStatisticsArguments&, Buffers&) {}

// Rows and a transform, checked: what all operators have.
class RowCall {
 public:
  RowCall(const Tensor& rows, const groups::Transform& transform)
      : rows_((check_rows("input", rows), rows)), transform_(transform) {
    check_transform(transform, rows);
    TORCH_CHECK_VALUE(transform.coefficients.size(-1) <= kMostPieces, "monosoftmax: the cuda backend takes up to ",
                      kMostPieces, " pieces, got ", transform.coefficients.size(-1));
    coefficients_ = transform.coefficients.contiguous();
  }

  at::TensorOptions numbers() const { return coefficients_.options(); }

  PlanRequest request() const {
    return {.transform = transform_.name,
            .size = coefficients_.size(-1),
            .rows = rows_.size(0),
            .classes = rows_.size(1),
            .element_bytes = static_cast<int>(rows_.element_size()),
            .deterministic = at::globalContext().deterministicAlgorithms()};
  }

  // Whether there are sums over logits to be computed.
  bool has_sums(groups::OutputMask mask) const { return mask.coefficients && coefficients_.numel() > 0; }

  // The gradient of the coefficients where there are no such sums.
  Tensor without_sums(groups::OutputMask mask) const {
    return mask.coefficients ? at::zeros_like(coefficients_) : nothing_like(coefficients_);
  }

  // Plans, and launches where there are rows. Returns the gradient of the coefficients.
  template <class Arguments>
  Tensor run(const PlanRequest& request, groups::OutputMask mask, Arguments& arguments,
             void (*launch)(const Plan&, std::string_view, ElementType, const Arguments&, Stream)) const {
    if (rows_.size(0) == 0) return without_sums(mask);
    arguments.input = rows_.const_data_ptr();
    arguments.stride = rows_.stride(0);
    arguments.rows = rows_.size(0);
    arguments.classes = static_cast<int>(rows_.size(1));
    arguments.transform = {.coefficients = coefficients_.const_data_ptr<float>(), .size = coefficients_.size(-1)};
    std::copy_n(transform_.constants.begin(), std::min<size_t>(transform_.constants.size(), 3),
                arguments.transform.constants);
    const OnDeviceOf on(rows_);
    const Plan plan = make_plan(request, on.device());
    Buffers buffers(plan, transform_.name, coefficients_);
    buffers.fill_table(transform_.name, arguments.transform, on.stream());
    take_sums(arguments, buffers);
    launch(plan, transform_.name, element_of(rows_), arguments, on.stream());
    return plan.sums == SumsKind::kNone ? without_sums(mask) : buffers.total();
  }

 private:
  const Tensor& rows_;
  const groups::Transform& transform_;
  Tensor coefficients_;
};

// A call of the loss. Holds what the arguments of the kernel point into.
class LossCall {
 public:
  LossCall(const Tensor& rows, const Tensor& target, const groups::Transform& transform,
           const groups::LossOptions& options)
      : on_rows_(rows, transform) {
    check_weight(options.weight, rows);
    check_indices(target, rows);
    target_ = target.contiguous();
    weight_ = contiguous(options.weight);
    if (weight_.has_value() && options.label_smoothing > 0) weight_sum_ = weight_->sum(at::kDouble).to(at::kFloat);
    arguments_.target = target_.const_data_ptr<int64_t>();
    arguments_.ignore_index = options.ignore_index;
    arguments_.label_smoothing = static_cast<float>(options.label_smoothing);
    arguments_.z_loss = static_cast<float>(options.z_loss);
    arguments_.weight = data_of(weight_);
    arguments_.weight_sum = data_of(weight_sum_);
    arguments_.return_lse = options.return_lse;
  }

  at::TensorOptions numbers() const { return on_rows_.numbers(); }

  void want_losses(groups::RowResults& results) {
    arguments_.losses = true;
    arguments_.loss = results.loss.mutable_data_ptr<float>();
    arguments_.lse = results.lse.mutable_data_ptr<float>();
    take_stats(results.row_stats);
  }
  void have_losses(const Tensor& row_stats) {
    arguments_.losses = false;
    take_stats(row_stats);
  }
  void take_upstream(const groups::Upstream& upstream) {
    grad_loss_ = upstream.loss.has_value() ? *upstream.loss : at::zeros({}, numbers());
    const bool one_for_all = grad_loss_.dim() == 0 || (grad_loss_.size(0) > 0 && grad_loss_.stride(0) == 0);
    if (!one_for_all) grad_loss_ = grad_loss_.contiguous();
    grad_lse_ = contiguous(upstream.lse);
    arguments_.grad_loss = grad_loss_.const_data_ptr<float>();
    arguments_.grad_loss_stride = one_for_all ? 0 : 1;
    arguments_.grad_lse = data_of(grad_lse_);
    arguments_.factor = data_of(upstream.factor);
  }
  void want_grad_rows(Tensor& grad_rows) {
    arguments_.grad_input = grad_rows.mutable_data_ptr();
    arguments_.grad_stride = grad_rows.stride(0);
  }

  // Returns the gradient of the coefficients.
  Tensor run(groups::OutputMask mask) {
    PlanRequest request = on_rows_.request();
    request.losses = arguments_.losses;
    request.coefficients = on_rows_.has_sums(mask);
    request.gradient = mask.rows || request.coefficients;
    request.weighted_smoothing = weight_sum_.has_value();
    if (!request.losses && !request.gradient) return on_rows_.without_sums(mask);
    return on_rows_.run(request, mask, arguments_, &launch_cross_entropy);
  }

 private:
  void take_stats(const Tensor& row_stats) {
    arguments_.largest = row_stats.mutable_data_ptr<float>();
    arguments_.sum = arguments_.largest + row_stats.size(1);
  }

  RowCall on_rows_;
  Tensor target_, grad_loss_;
  Optional weight_, weight_sum_, grad_lse_;
  CrossEntropyArguments arguments_{};
};

groups::RowResults cross_entropy(const Tensor& rows, const Tensor& target, const groups::Transform& transform,
                                 const groups::LossOptions& options, const std::optional<groups::Upstream>& upstream,
                                 const Optional& row_stats, groups::OutputMask mask, const Optional& grad_rows) {
  LossCall call(rows, target, transform, options);
  check_upstream(upstream, rows, mask);
  check_grad_rows(kMemory, grad_rows, rows, mask);
  TORCH_CHECK_VALUE(!upstream.has_value() || !upstream->factor.has_value() ||
                        (row_stats.has_value() && grad_rows.has_value() && !mask.coefficients),
                    "monosoftmax: a factor is for the gradient of rows of an earlier call, in grad_rows");
  const auto numbers = [&](c10::IntArrayRef shape) { return at::empty(shape, call.numbers()); };
  const int64_t count = rows.size(0);
  groups::RowResults results;
  Tensor stats;
  if (row_stats.has_value()) {
    check_beside("row_stats", *row_stats, rows, {2, count});
    stats = row_stats->contiguous();
    results = {numbers({0}), numbers({0}), numbers({0})};
    call.have_losses(stats);
  } else {
    results = {numbers({count}), numbers({count}), numbers({2, count})};
    call.want_losses(results);
    // The kernel that computes both has upstream gradients of the losses only.
    if (mask.any() && upstream->lse.has_value()) {
      call.run({});
      call.have_losses(results.row_stats);
    }
  }
  results.grad_rows = grad_rows.has_value() ? *grad_rows : gradient_if(mask.rows, rows);
  if (mask.any()) call.take_upstream(*upstream);
  if (mask.rows) call.want_grad_rows(results.grad_rows);
  results.grad_coefficients = call.run(mask);
  return results;
}

std::tuple<Tensor, Tensor> log_softmax(const Tensor& rows, const groups::Transform& transform, at::ScalarType dtype) {
  const RowCall call(rows, transform);
  Tensor output = at::empty(rows.sizes(), rows.options().dtype(dtype));
  Tensor row_stats = at::empty({2, rows.size(0)}, call.numbers());
  float* stats = row_stats.mutable_data_ptr<float>();
  LogSoftmaxArguments arguments{.output = output.mutable_data_ptr(),
                                .output_type = element_of(output),
                                .output_stride = output.stride(0),
                                .largest = stats,
                                .sum = stats + rows.size(0)};
  call.run(call.request(), {}, arguments, &launch_log_softmax);
  return {output, row_stats};
}

std::tuple<Tensor, Tensor> log_softmax_backward(const Tensor& grad_output, const Tensor& rows,
                                                const groups::Transform& transform, const Tensor& row_stats,
                                                groups::OutputMask mask) {
  const RowCall call(rows, transform);
  check_beside("grad_output", grad_output, rows, rows.sizes(), grad_output.scalar_type());
  const Tensor grad = grad_output.stride(1) == 1 ? grad_output : grad_output.contiguous();
  check_rows("grad_output", grad);
  check_beside("row_stats", row_stats, rows, {2, rows.size(0)});
  const Tensor stats = row_stats.contiguous();
  Tensor grad_rows = gradient_if(mask.rows, rows);
  PlanRequest request = call.request();
  request.gradient = true;
  request.coefficients = call.has_sums(mask);
  if (!mask.rows && !request.coefficients) return {grad_rows, call.without_sums(mask)};
  LogSoftmaxBackwardArguments arguments{.grad_output = grad.const_data_ptr(),
                                        .grad_output_type = element_of(grad),
                                        .grad_output_stride = grad.stride(0),
                                        .largest = stats.const_data_ptr<float>(),
                                        .sum = stats.const_data_ptr<float>() + rows.size(0),
                                        .grad_input = mask.rows ? grad_rows.mutable_data_ptr() : nullptr,
                                        .grad_stride = grad_rows.stride(0)};
  const Tensor grad_coefficients = call.run(request, mask, arguments, &launch_log_softmax_backward);
  return {grad_rows, grad_coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_statistics(const Tensor& rows, const Tensor& target,
                                                                    const groups::Transform& transform,
                                                                    int64_t ignore_index) {
  const RowCall call(rows, transform);
  check_indices(target, rows);
  const Tensor targets = target.contiguous();
  const auto empty = [&](const at::TensorOptions& options) { return at::empty({rows.size(0)}, options); };
  Tensor log_prob = empty(call.numbers()), entropy = empty(call.numbers()), lse = empty(call.numbers());
  Tensor argmax = empty(target.options()), rank = empty(target.options());
  TokenStatisticsArguments arguments{.target = targets.const_data_ptr<int64_t>(),
                                     .ignore_index = ignore_index,
                                     .log_prob = log_prob.mutable_data_ptr<float>(),
                                     .entropy = entropy.mutable_data_ptr<float>(),
                                     .lse = lse.mutable_data_ptr<float>(),
                                     .argmax = argmax.mutable_data_ptr<int64_t>(),
                                     .rank = rank.mutable_data_ptr<int64_t>()};
  call.run(call.request(), {}, arguments, &launch_token_statistics);
  return {log_prob, entropy, argmax, lse, rank};
}

}  // namespace

const RowOperators kRowOperators{&cross_entropy, &token_statistics, &log_softmax, &log_softmax_backward};

void scale_(const Tensor& tensor, const Tensor& factor) {
  TORCH_CHECK_VALUE(is_ours(tensor) && tensor.is_contiguous(),
                    "monosoftmax: scale_ takes contiguous memory on a device");
  check_beside("factor", factor, tensor, {}, at::kFloat);
  const OnDeviceOf on(tensor);
  launch_scale(tensor.mutable_data_ptr(), element_of(tensor), tensor.numel(), factor.const_data_ptr<float>(),
               on.device().multiprocessors, on.stream());
}

std::string describe_plan(const Tensor& rows, std::string_view transform, int64_t size, bool gradient,
                          bool coefficients) {
  const PlanRequest request{.transform = transform,
                            .size = size,
                            .rows = rows.size(0),
                            .classes = rows.size(1),
                            .element_bytes = static_cast<int>(rows.element_size()),
                            .losses = true,
                            .gradient = gradient,
                            .coefficients = coefficients,
                            .deterministic = at::globalContext().deterministicAlgorithms()};
  return describe(make_plan(request, OnDeviceOf(rows).device()));
}

}  // namespace monosoftmax::cuda
