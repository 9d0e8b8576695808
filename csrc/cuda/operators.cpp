// The operators of the cuda backend. They check their arguments, allocate the results, make a plan, and launch
// (launch.h). Nothing here waits for the device, and all work is in its current stream: so graphs can capture calls.
#include <ATen/Context.h>
#include <ATen/DimVector.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <string>

#include "../transforms/inner.h"
#include "limits.h"

namespace monosoftmax::cuda {
namespace {

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

Tensor gradient_if(bool wanted, const Tensor& rows) {
  return wanted ? at::empty(rows.sizes(), rows.options()) : nothing_like(rows);
}

// The buffers of a call: the table for look-ups, and the sums for the gradient of the coefficients.
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
    // Warps and atomics add to their sums, which must begin at 0. A block writes all of its sums.
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
    if (sums_.scalar_type() == at::kDouble) return {.total = sums_.mutable_data_ptr<double>()};
    return {.partials = sums_.mutable_data_ptr<float>()};
  }
  // The second stage: adds up the sums of blocks or warps.
  Tensor total() const { return sums_.sum(0, false, at::kDouble).to(at::kFloat); }

 private:
  Tensor table_, sums_;
};

void take_sums(CrossEntropyArguments& arguments, Buffers& buffers) { arguments.sums = buffers.sums(); }
void take_sums(LogSoftmaxBackwardArguments& arguments, Buffers& buffers) { arguments.sums = buffers.sums(); }
void take_sums(DenseTargetArguments& arguments, Buffers& buffers) { arguments.sums = buffers.sums(); }
void take_sums(LogSoftmaxArguments&, Buffers&) {}
void take_sums(TokenStatisticsArguments&, Buffers&) {}

// The arguments that all operators have, rows and a transform, checked.
class RowCall {
 public:
  RowCall(const Tensor& rows, const groups::Transform& transform)
      : rows_((check_rows("input", rows), rows)), transform_(transform) {
    check_transform(transform, rows);
    TORCH_CHECK_VALUE(transform.coefficients.size(-1) <= kMostPieces, "monosoftmax: the cuda backend takes up to ",
                      kMostPieces, " pieces, got ", transform.coefficients.size(-1));
    coefficients_ = transform.coefficients.contiguous();
    arguments_ = {.coefficients = coefficients_.const_data_ptr<float>(), .size = coefficients_.size(-1)};
    std::copy_n(transform.constants.begin(), std::min<size_t>(transform.constants.size(), 3), arguments_.constants);
    if (!transform.inner.empty()) {
      const auto scale = static_cast<float>(transform.inner[0]), cap = static_cast<float>(transform.inner[1]);
      arguments_.inner = {.present = true, .scale = scale, .cap = cap, .within = Inner<float>::within(scale, cap)};
    }
    arguments_.temperature = data_of<float>(transform.temperature);
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

  // Whether the kernels must compute sums over logits.
  bool has_sums(groups::OutputMask mask) const { return mask.coefficients && coefficients_.numel() > 0; }

  // The gradient of the coefficients without such sums.
  Tensor without_sums(groups::OutputMask mask) const {
    return mask.coefficients ? at::zeros_like(coefficients_) : nothing_like(coefficients_);
  }

  // Plans and launches, unless there are no rows. Returns the gradient of the coefficients.
  template <class Arguments>
  Tensor run(const PlanRequest& request, groups::OutputMask mask, Arguments& arguments,
             void (*launch)(const Plan&, std::string_view, ElementType, const Arguments&, Stream)) const {
    if (rows_.size(0) == 0) return without_sums(mask);
    arguments.input = rows_.const_data_ptr();
    arguments.stride = rows_.stride(0);
    arguments.rows = rows_.size(0);
    arguments.classes = static_cast<int>(rows_.size(1));
    arguments.transform = arguments_;
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
  TransformArguments arguments_;
};

DenseLoss dense_loss_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::kForwardKl: return DenseLoss::kForwardKl;
    case Divergence::kReverseKl: return DenseLoss::kReverseKl;
    case Divergence::kJsd: break;
  }
  return DenseLoss::kJsd;
}

// The gradient of rows, and the upstream gradients, of a call of the loss kernels. It owns what the arguments point to.
class LossGradients {
 public:
  LossGradients(const RowCall& call, const std::optional<groups::Upstream>& upstream, groups::OutputMask mask,
                const Tensor& grad_rows)
      : any_(mask.any()), rows_(mask.rows ? grad_rows : Tensor()) {
    const auto [loss, lse, factor, entropy] = upstream.value_or(groups::Upstream{});
    lse_ = contiguous(lse);
    entropy_ = contiguous(entropy);
    factor_ = factor;
    if (!any_) return;
    loss_ = loss.has_value() ? *loss : at::zeros({}, call.numbers());
    one_for_all_ = loss_.dim() == 0 || (loss_.size(0) > 0 && loss_.stride(0) == 0);
    if (!one_for_all_) loss_ = loss_.contiguous();
  }

  bool any() const { return any_; }
  bool of_lse() const { return lse_.has_value(); }
  bool of_entropy() const { return any_ && entropy_.has_value(); }

  template <class Arguments>
  void give(Arguments& arguments) const {
    arguments.factor = data_of<float>(factor_);
    if (!any_) return;
    arguments.grad_loss = loss_.const_data_ptr<float>();
    arguments.grad_loss_stride = one_for_all_ ? 0 : 1;
    arguments.grad_lse = data_of<float>(lse_);
    if (!rows_.defined()) return;
    arguments.grad_input = rows_.mutable_data_ptr();
    arguments.grad_stride = rows_.stride(0);
  }
  void give(DenseTargetArguments& arguments) const {
    give<DenseTargetArguments>(arguments);
    arguments.grad_entropy = data_of<float>(entropy_);
  }

 private:
  bool any_, one_for_all_ = true;
  Tensor rows_, loss_;
  Optional lse_, entropy_, factor_;
};

// Launches the kernel for targets of all classes; `arguments` say which. Returns the gradient of the coefficients.
Tensor run_dense(const RowCall& call, groups::OutputMask mask, DenseTargetArguments& arguments) {
  PlanRequest request = call.request();
  request.coefficients = call.has_sums(mask);
  request.gradient = mask.rows || request.coefficients;
  if (!arguments.losses && !request.gradient) return call.without_sums(mask);
  arguments.gradients = request.gradient;
  return call.run(request, mask, arguments, &launch_dense_target);
}

// The losses of rows for class probabilities, or the divergence from log q, and their gradients. `arguments` has the
// kind and its options.
groups::RowResults run_dense(const RowCall& call, const Tensor& rows, const Tensor& target,
                             const std::optional<groups::Upstream>& upstream, const Optional& row_stats,
                             groups::OutputMask mask, const Optional& grad_rows, DenseTargetArguments arguments) {
  groups::RowResults results = room_for_losses(rows, 3, row_stats);
  results.grad_rows = grad_rows.has_value() ? *grad_rows : gradient_if(mask.rows, rows);
  const LossGradients gradients(call, upstream, mask, results.grad_rows);
  // No kernel reads float64.
  const Tensor given = target.scalar_type() == at::kDouble ? target.to(at::kFloat) : target;
  const Tensor stats = row_stats.has_value() ? row_stats->contiguous() : results.row_stats;
  arguments.target = given.const_data_ptr();
  arguments.target_type = element_of(given);
  arguments.target_stride = given.stride(0);
  arguments.losses = !row_stats.has_value();
  arguments.loss = results.loss.mutable_data_ptr<float>();
  arguments.lse = results.lse.mutable_data_ptr<float>();
  arguments.row_stats = stats.mutable_data_ptr<float>();
  gradients.give(arguments);
  results.grad_coefficients = run_dense(call, mask, arguments);
  return results;
}

groups::RowResults cross_entropy(const Tensor& rows, const Tensor& target, const groups::Transform& transform,
                                 const groups::LossOptions& options, const std::optional<groups::Upstream>& upstream,
                                 const Optional& row_stats, groups::OutputMask mask, const Optional& grad_rows) {
  const RowCall call(rows, transform);
  check_weight(options.weight, rows);
  check_upstream(upstream, rows, mask);
  check_grad_rows(kMemory, grad_rows, rows, mask);
  const bool has_factor = upstream.has_value() && upstream->factor.has_value();
  const bool of_entropy = upstream.has_value() && upstream->entropy.has_value();
  TORCH_CHECK_VALUE(
      !has_factor || (row_stats.has_value() && grad_rows.has_value() && !mask.coefficients && !of_entropy),
      "monosoftmax: a factor is for the gradient of rows of an earlier call, in grad_rows");
  const Optional weight = contiguous(options.weight);
  const auto label_smoothing = static_cast<float>(options.label_smoothing), z_loss = static_cast<float>(options.z_loss);
  if (target.is_floating_point()) {
    TORCH_CHECK_VALUE(!of_entropy, "monosoftmax: a gradient of the entropy needs indices as the target");
    return run_dense(call, rows, checked_like(kMemory, "target", target, rows), upstream, row_stats, mask, grad_rows,
                     {.kind = DenseLoss::kOfProbabilities,
                      .label_smoothing = label_smoothing,
                      .z_loss = z_loss,
                      .weight = data_of<float>(weight)});
  }
  check_indices(target, rows);
  const bool with_gap = row_stats.has_value() && row_stats->dim() == 2 && row_stats->size(0) == 3;
  TORCH_CHECK_VALUE(!of_entropy || with_gap,
                    "monosoftmax: a gradient of the entropy needs the row_stats [3, N] of token_statistics");
  groups::RowResults results = room_for_losses(rows, with_gap ? 3 : 2, row_stats);
  results.grad_rows = grad_rows.has_value() ? *grad_rows : gradient_if(mask.rows, rows);
  const LossGradients gradients(call, upstream, mask, results.grad_rows);
  const Tensor targets = target.contiguous();
  Optional weight_sum;
  if (weight.has_value() && options.label_smoothing > 0) weight_sum = weight->sum(at::kDouble).to(at::kFloat);
  const Tensor stats = row_stats.has_value() ? row_stats->contiguous() : results.row_stats;
  if (gradients.of_entropy()) {
    DenseTargetArguments arguments{.kind = DenseLoss::kOfIndices,
                                   .indices = targets.const_data_ptr<int64_t>(),
                                   .ignore_index = options.ignore_index,
                                   .label_smoothing = label_smoothing,
                                   .z_loss = z_loss,
                                   .weight = data_of<float>(weight),
                                   .weight_sum = data_of<float>(weight_sum),
                                   .row_stats = stats.mutable_data_ptr<float>()};
    gradients.give(arguments);
    results.grad_coefficients = run_dense(call, mask, arguments);
    return results;
  }
  CrossEntropyArguments arguments{.target = targets.const_data_ptr<int64_t>(),
                                  .ignore_index = options.ignore_index,
                                  .label_smoothing = label_smoothing,
                                  .z_loss = z_loss,
                                  .weight = data_of<float>(weight),
                                  .weight_sum = data_of<float>(weight_sum),
                                  .losses = !row_stats.has_value(),
                                  .return_lse = options.return_lse,
                                  .loss = results.loss.mutable_data_ptr<float>(),
                                  .lse = results.lse.mutable_data_ptr<float>(),
                                  .largest = stats.mutable_data_ptr<float>(),
                                  .sum = stats.mutable_data_ptr<float>() + rows.size(0)};
  const auto run = [&](groups::OutputMask wanted) {
    PlanRequest request = call.request();
    request.losses = arguments.losses;
    request.coefficients = call.has_sums(wanted);
    request.gradient = wanted.rows || request.coefficients;
    request.weighted_smoothing = weight_sum.has_value();
    if (!request.losses && !request.gradient) return call.without_sums(wanted);
    return call.run(request, wanted, arguments, &launch_cross_entropy);
  };
  if (arguments.losses && mask.any() && gradients.of_lse()) {
    // The kernel that computes losses and gradients takes no upstream gradient of lse.
    run({});
    arguments.losses = false;
  }
  gradients.give(arguments);
  results.grad_coefficients = run(mask);
  return results;
}

groups::RowResults divergence(const Tensor& rows, const Tensor& log_target, const groups::Transform& transform,
                              const groups::Divergence& given, const std::optional<groups::Upstream>& upstream,
                              const Optional& row_stats, groups::OutputMask mask, const Optional& grad_rows) {
  const RowCall call(rows, transform);
  const DenseLoss loss = dense_loss_of(divergence_of(given));
  check_upstream(upstream, rows, mask);
  check_grad_rows(kMemory, grad_rows, rows, mask);
  std::optional<groups::Upstream> of_loss;
  if (upstream.has_value()) of_loss = groups::Upstream{.loss = upstream->loss};
  return run_dense(call, rows, checked_like(kMemory, "log_target", log_target, rows), of_loss, row_stats, mask,
                   grad_rows, {.kind = loss, .beta = static_cast<float>(given.beta)});
}

std::tuple<Tensor, Tensor> log_softmax(const Tensor& rows, const groups::Transform& transform, at::ScalarType dtype,
                                       const Optional& out) {
  const RowCall call(rows, transform);
  Tensor output = output_for(kMemory, out, rows, dtype);
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
  const Tensor grad = checked_like(kMemory, "grad_output", grad_output, rows);
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

groups::TokenStatistics token_statistics(const Tensor& rows, const Tensor& target, const groups::Transform& transform,
                                         int64_t ignore_index) {
  const RowCall call(rows, transform);
  check_indices(target, rows);
  const Tensor targets = target.contiguous();
  groups::TokenStatistics results = room_for_statistics(rows);
  auto& [log_prob, entropy, argmax, lse, rank, row_stats] = results;
  TokenStatisticsArguments arguments{.target = targets.const_data_ptr<int64_t>(),
                                     .ignore_index = ignore_index,
                                     .log_prob = log_prob.mutable_data_ptr<float>(),
                                     .entropy = entropy.mutable_data_ptr<float>(),
                                     .lse = lse.mutable_data_ptr<float>(),
                                     .argmax = argmax.mutable_data_ptr<int64_t>(),
                                     .rank = rank.mutable_data_ptr<int64_t>(),
                                     .row_stats = row_stats.mutable_data_ptr<float>()};
  call.run(call.request(), {}, arguments, &launch_token_statistics);
  return results;
}

}  // namespace

const RowOperators kRowOperators{
    &cross_entropy,     &token_statistics,          &divergence, &log_softmax, &log_softmax_backward,
    &plif_coefficients, &plif_coefficients_backward};

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
