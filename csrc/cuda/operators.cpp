// The operators of the cuda backend: checks, outputs, plans. The schemas are in monosoftmax/ops.py, the kernels in
// cross_entropy.cuh. Nothing here waits for the device, and all is in its current stream: calls can be captured in
// graphs.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../transforms/registry.h"
#include "torch_device.h"

#ifndef MONOSOFTMAX_DISPATCH_KEY
#define MONOSOFTMAX_DISPATCH_KEY CUDA
#endif

namespace monosoftmax::cuda {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Constants = c10::ArrayRef<double>;

// Entries of a table are counted in the last bits of a float (arithmetic.cuh).
constexpr int64_t kMostPieces = 1 << 22;

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
  TORCH_CHECK_VALUE(is_ours(rows), "monosoftmax: ", name, " must be on a CUDA device, got ", rows.device());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) > 0, "monosoftmax: ", name,
                    " must have shape [N, V] with V > 0, got ", rows.sizes());
  TORCH_CHECK_VALUE(rows.size(1) == 1 || rows.stride(1) == 1, "monosoftmax: ", name,
                    " must have its columns next to each other, got strides ", rows.strides());
  // Columns are numbered by int.
  TORCH_CHECK_VALUE(rows.size(1) <= std::numeric_limits<int>::max() / 2, "monosoftmax: ", name, " has ", rows.size(1),
                    " columns; the cuda backend takes up to ", std::numeric_limits<int>::max() / 2);
  element_of(rows);
}

void check_beside(const char* name, const Tensor& tensor, const Tensor& input, c10::IntArrayRef shape,
                  at::ScalarType type = at::kFloat) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "monosoftmax: ", name, " must have shape ", shape, ", got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, "monosoftmax: ", name, " must be ", type, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == input.device(), "monosoftmax: ", name, " must be on ", input.device(), ", got ",
                    tensor.device());
}

const float* data_of(const Optional& tensor) { return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr; }

Optional contiguous(const Optional& tensor) { return tensor.has_value() ? Optional(tensor->contiguous()) : Optional(); }

struct Transform {
  Tensor coefficients;
  c10::string_view name;
  Constants constants;
  TransformShape shape{};

  Transform(const Tensor& input, const Tensor& coefficients_, c10::string_view name_, Constants constants_)
      : coefficients(coefficients_.contiguous()), name(name_), constants(constants_) {
    TORCH_CHECK_VALUE(find_transform(std::string_view(name.data(), name.size()), &shape),
                      "monosoftmax: unknown transform \"", name, "\"");
    TORCH_CHECK_VALUE(
        coefficients.dim() == (shape.table_rows > 0 ? 2 : 1) && shape.smallest <= size() && size() <= shape.largest &&
            (shape.table_rows == 0 || coefficients.size(0) == shape.table_rows),
        "monosoftmax: coefficients of shape ", coefficients.sizes(), " do not fit transform \"", name, "\"");
    TORCH_CHECK_VALUE(size() <= kMostPieces, "monosoftmax: the cuda backend takes up to ", kMostPieces, " pieces, got ",
                      size());
    TORCH_CHECK_VALUE(name != "plif" || constants.size() == 3, "monosoftmax: plif takes 3 constants");
    TORCH_CHECK_VALUE(name != "monotonic_mlp" || size() % 3 == 1,
                      "monosoftmax: monotonic_mlp takes 3H + 1 coefficients");
    check_beside("coefficients", coefficients, input, coefficients.sizes());
  }
  std::string_view view() const { return {name.data(), name.size()}; }
  int64_t size() const { return coefficients.size(-1); }
  TransformArguments arguments() const {
    TransformArguments result{coefficients.const_data_ptr<float>(), size(), {}, nullptr};
    for (size_t i = 0; i < constants.size() && i < 3; ++i) result.constants[i] = constants[i];
    return result;
  }
};

struct Options {
  Optional weight, weight_sum;
  int64_t ignore_index;
  double label_smoothing, z_loss;

  Options(const Tensor& input, const Optional& weight_, int64_t ignore_index_, double label_smoothing_, double z_loss_)
      : weight(contiguous(weight_)), ignore_index(ignore_index_), label_smoothing(label_smoothing_), z_loss(z_loss_) {
    if (!weight.has_value()) return;
    check_beside("weight", *weight, input, {input.size(1)});
    if (smooths()) weight_sum = weight->sum(at::kDouble).to(at::kFloat);
  }
  bool smooths() const { return label_smoothing > 0; }
};

// The buffers of a call beside its results: the table for look-ups, and the sums for the gradient of the coefficients.
class Buffers {
 public:
  Buffers(const Plan& plan, const Transform& transform, TransformArguments& arguments, SumsArguments& sums,
          Stream stream) {
    const at::TensorOptions options = transform.coefficients.options();
    if (!plan.table_in_shared_memory) {
      if (const int64_t numbers = table_numbers(transform.view(), transform.size()); numbers > 0) {
        table_ = at::empty({numbers}, options);
        launch_fill_table(transform.view(), arguments, table_.mutable_data_ptr<float>(), stream);
        arguments.table = table_.const_data_ptr<float>();
      }
    }
    if (plan.sums == SumsKind::kNone) return;
    std::vector<int64_t> sizes = transform.coefficients.sizes().vec();
    sizes.insert(sizes.begin(), plan.sum_sets);
    // Each block writes all of its own; of tables in memory, each warp adds to it.
    if (plan.atomic) {
      partials_ = at::zeros(sizes, options.dtype(at::kDouble));
      sums.total = partials_.mutable_data_ptr<double>();
      return;
    }
    partials_ = plan.sums == SumsKind::kWarps ? at::zeros(sizes, options) : at::empty(sizes, options);
    sums.partials = partials_.mutable_data_ptr<float>();
  }
  // The second stage.
  Tensor total() const { return partials_.sum(0, false, at::kDouble).to(at::kFloat); }

 private:
  Tensor table_, partials_;
};

PlanRequest request_of(const Tensor& input, const Transform& transform) {
  PlanRequest request{};
  request.transform = transform.view();
  request.size = transform.size();
  request.rows = input.size(0);
  request.classes = input.size(1);
  request.element_bytes = static_cast<int>(input.element_size());
  request.deterministic = at::globalContext().deterministicAlgorithms();
  return request;
}

// A call of the loss kernels: what is given is set, then run() plans and launches.
class Loss {
 public:
  Loss(const Tensor& input, const Tensor& target, const Optional& weight, const Tensor& coefficients,
       c10::string_view transform, Constants constants, int64_t ignore_index, double label_smoothing, double z_loss)
      : input_(input),
        target_(target.contiguous()),
        transform_((check_rows("input", input), input), coefficients, transform, constants),
        options_(input, weight, ignore_index, label_smoothing, z_loss) {
    check_beside("target", target_, input, {input.size(0)}, at::kLong);
    CrossEntropyArguments& a = arguments_;
    a.input = input.const_data_ptr();
    a.stride = input.stride(0);
    a.rows = input.size(0);
    a.classes = static_cast<int>(input.size(1));
    a.target = target_.const_data_ptr<int64_t>();
    a.transform = transform_.arguments();
    a.ignore_index = options_.ignore_index;
    a.label_smoothing = static_cast<float>(options_.label_smoothing);
    a.z_loss = static_cast<float>(options_.z_loss);
    a.weight = data_of(options_.weight);
    a.weight_sum = data_of(options_.weight_sum);
  }

  void want_losses(bool return_lse) {
    loss = empty({input_.size(0)});
    lse = at::empty_like(loss);
    row_stats = empty({2, input_.size(0)});
    arguments_.losses = true;
    arguments_.return_lse = return_lse;
    arguments_.loss = loss.mutable_data_ptr<float>();
    arguments_.lse = lse.mutable_data_ptr<float>();
    take_stats();
  }
  void have_row_stats(const Tensor& stats) {
    check_beside("row_stats", stats, input_, {2, input_.size(0)});
    row_stats = stats.contiguous();
    take_stats();
  }
  // One upstream gradient for all losses, or one each.
  void have_grad_loss(const Tensor& grad_loss) {
    const bool one = grad_loss.dim() == 0 || (grad_loss.size(0) > 0 && grad_loss.stride(0) == 0);
    if (grad_loss.dim() > 0) {
      check_beside("grad_loss", grad_loss, input_, {input_.size(0)});
    } else {
      check_beside("scale", grad_loss, input_, {});
    }
    grad_loss_ = one ? grad_loss : grad_loss.contiguous();
    arguments_.grad_loss = grad_loss_.const_data_ptr<float>();
    arguments_.grad_loss_stride = one ? 0 : 1;
  }
  void have_grad_lse(const Tensor& grad_lse) {
    check_beside("grad_lse", grad_lse, input_, {input_.size(0)});
    grad_lse_ = grad_lse.contiguous();
    arguments_.grad_lse = grad_lse_.const_data_ptr<float>();
  }
  void have_factor(const Tensor& factor) {
    check_beside("factor", factor, input_, {});
    factor_ = factor;
    arguments_.factor = factor_.const_data_ptr<float>();
  }
  void want_grad_input(Tensor& grad_input) {
    check_beside("grad_input", grad_input, input_, input_.sizes(), input_.scalar_type());
    arguments_.grad_input = grad_input.mutable_data_ptr();
    arguments_.grad_stride = grad_input.stride(0);
  }
  void want_grad_coefficients(bool wanted) { coefficients_wanted_ = wanted; }

  // The gradient of the coefficients; empty where it is not wanted.
  Tensor run() {
    const bool sums = coefficients_wanted_ && transform_.coefficients.numel() > 0;
    const bool gradient = arguments_.grad_input != nullptr || sums;
    const Tensor nothing = coefficients_wanted_ ? at::zeros_like(transform_.coefficients) : empty_like_coefficients();
    if (input_.size(0) == 0 || !(gradient || arguments_.losses)) return nothing;
    TORCH_CHECK_VALUE(!gradient || arguments_.grad_loss != nullptr, "monosoftmax: gradients need a scale");
    const OnDeviceOf on(input_);
    PlanRequest request = request_of(input_, transform_);
    request.losses = arguments_.losses;
    request.gradient = gradient;
    request.coefficients = sums;
    request.weighted_smoothing = options_.weight.has_value() && options_.smooths();
    const Plan plan = make_plan(request, on.device());
    const Buffers buffers(plan, transform_, arguments_.transform, arguments_.sums, on.stream());
    launch_cross_entropy(plan, transform_.view(), element_of(input_), arguments_, on.stream());
    return sums ? buffers.total() : nothing;
  }

  Tensor loss, lse, row_stats;

 private:
  Tensor empty(c10::IntArrayRef sizes) const { return at::empty(sizes, input_.options().dtype(at::kFloat)); }
  Tensor empty_like_coefficients() const { return empty({0}); }
  void take_stats() {
    arguments_.largest = row_stats.mutable_data_ptr<float>();
    arguments_.sum = arguments_.largest + input_.size(0);
  }

  const Tensor& input_;
  Tensor target_;
  Transform transform_;
  Options options_;
  Tensor grad_loss_, grad_lse_, factor_;
  bool coefficients_wanted_ = false;
  CrossEntropyArguments arguments_{};
};

Tensor empty_gradient(const Tensor& input, bool needed) {
  return needed ? at::empty(input.sizes(), input.options()) : at::empty({0}, input.options());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& input, const Tensor& target, const Optional& weight, const Tensor& coefficients,
    c10::string_view transform, Constants constants, int64_t ignore_index, double label_smoothing, double z_loss,
    bool return_lse, const Optional& scale, bool need_input, bool need_coefficients) {
  Loss call(input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss);
  TORCH_CHECK_VALUE(scale.has_value() || !(need_input || need_coefficients), "monosoftmax: gradients need a scale");
  call.want_losses(return_lse);
  if (scale.has_value()) call.have_grad_loss(*scale);
  Tensor grad_input = empty_gradient(input, need_input);
  if (need_input) call.want_grad_input(grad_input);
  call.want_grad_coefficients(need_coefficients);
  const Tensor grad_coefficients = call.run();
  const Tensor total = scale.has_value() ? at::mul(call.loss.sum(), *scale) : at::empty({0}, call.loss.options());
  return {call.loss, call.lse, call.row_stats, total, grad_input, grad_coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_(Tensor& input, const Tensor& target, const Optional& weight,
                                                          const Tensor& coefficients, c10::string_view transform,
                                                          Constants constants, int64_t ignore_index,
                                                          double label_smoothing, double z_loss, bool return_lse,
                                                          const Tensor& scale, bool need_coefficients) {
  Loss call(input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss);
  call.want_losses(return_lse);
  call.have_grad_loss(scale);
  call.want_grad_input(input);
  call.want_grad_coefficients(need_coefficients);
  const Tensor grad_coefficients = call.run();
  return {call.loss, call.lse, call.row_stats, grad_coefficients};
}

Tensor backward_of(const Optional& grad_loss, const Optional& grad_lse, const Tensor& input, const Tensor& target,
                   const Optional& weight, const Tensor& coefficients, c10::string_view transform, Constants constants,
                   const Tensor& row_stats, int64_t ignore_index, double label_smoothing, double z_loss,
                   Tensor* grad_input, bool need_coefficients) {
  Loss call(input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss);
  call.have_row_stats(row_stats);
  call.have_grad_loss(grad_loss.has_value() ? *grad_loss : at::zeros({}, row_stats.options()));
  if (grad_lse.has_value()) call.have_grad_lse(*grad_lse);
  if (grad_input != nullptr) call.want_grad_input(*grad_input);
  call.want_grad_coefficients(need_coefficients);
  return call.run();
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Optional& grad_loss, const Optional& grad_lse,
                                                  const Tensor& input, const Tensor& target, const Optional& weight,
                                                  const Tensor& coefficients, c10::string_view transform,
                                                  Constants constants, const Tensor& row_stats, int64_t ignore_index,
                                                  double label_smoothing, double z_loss, bool need_input,
                                                  bool need_coefficients) {
  Tensor grad_input = empty_gradient(input, need_input);
  const Tensor grad_coefficients =
      backward_of(grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats,
                  ignore_index, label_smoothing, z_loss, need_input ? &grad_input : nullptr, need_coefficients);
  return {grad_input, grad_coefficients};
}

Tensor cross_entropy_backward_(const Optional& grad_loss, const Optional& grad_lse, Tensor& input, const Tensor& target,
                               const Optional& weight, const Tensor& coefficients, c10::string_view transform,
                               Constants constants, const Tensor& row_stats, int64_t ignore_index,
                               double label_smoothing, double z_loss, bool need_coefficients) {
  return backward_of(grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats,
                     ignore_index, label_smoothing, z_loss, &input, need_coefficients);
}

void cross_entropy_rescale_(Tensor& grad_input, const Tensor& factor, const Tensor& scale, const Tensor& input,
                            const Tensor& target, const Optional& weight, const Tensor& coefficients,
                            c10::string_view transform, Constants constants, const Tensor& row_stats,
                            int64_t ignore_index, double label_smoothing, double z_loss) {
  Loss call(input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss);
  call.have_row_stats(row_stats);
  call.have_grad_loss(scale);
  call.have_factor(factor);
  call.want_grad_input(grad_input);
  call.run();
}

void scale_(Tensor& input, const Tensor& factor) {
  TORCH_CHECK_VALUE(is_ours(input) && input.is_contiguous(), "monosoftmax: scale_ takes contiguous memory on a device");
  check_beside("factor", factor, input, {});
  const OnDeviceOf on(input);
  launch_scale(input.mutable_data_ptr(), element_of(input), input.numel(), factor.const_data_ptr<float>(),
               on.device().multiprocessors, on.stream());
}

std::tuple<Tensor, Tensor> log_softmax(const Tensor& input, const Tensor& coefficients, c10::string_view transform,
                                       Constants constants, at::ScalarType dtype) {
  check_rows("input", input);
  const Transform of(input, coefficients, transform, constants);
  Tensor output = at::empty(input.sizes(), input.options().dtype(dtype));
  Tensor row_stats = at::empty({2, input.size(0)}, input.options().dtype(at::kFloat));
  const ElementType output_type = element_of(output);
  if (input.size(0) == 0) return {output, row_stats};
  float* stats = row_stats.mutable_data_ptr<float>();
  LogSoftmaxArguments arguments{input.const_data_ptr(),
                                input.stride(0),
                                input.size(0),
                                static_cast<int>(input.size(1)),
                                of.arguments(),
                                output.mutable_data_ptr(),
                                output_type,
                                output.stride(0),
                                stats,
                                stats + input.size(0)};
  const OnDeviceOf on(input);
  const Plan plan = make_plan(request_of(input, of), on.device());
  SumsArguments none{};
  const Buffers buffers(plan, of, arguments.transform, none, on.stream());
  launch_log_softmax(plan, of.view(), element_of(input), arguments, on.stream());
  return {output, row_stats};
}

std::tuple<Tensor, Tensor> log_softmax_backward(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& coefficients, c10::string_view transform,
                                                Constants constants, const Tensor& row_stats, bool need_input,
                                                bool need_coefficients) {
  check_rows("input", input);
  const Transform of(input, coefficients, transform, constants);
  check_beside("grad_output", grad_output, input, input.sizes(), grad_output.scalar_type());
  check_beside("row_stats", row_stats, input, {2, input.size(0)});
  const Tensor stats = row_stats.contiguous();
  Tensor grad_input = empty_gradient(input, need_input);
  const bool sums = need_coefficients && of.coefficients.numel() > 0;
  const Tensor nothing = need_coefficients ? at::zeros_like(of.coefficients) : at::empty({0}, stats.options());
  if (input.size(0) == 0 || !(need_input || sums)) return {grad_input, nothing};
  const Tensor grad = grad_output.stride(1) == 1 ? grad_output : grad_output.contiguous();
  check_rows("grad_output", grad);
  const float* largest = stats.const_data_ptr<float>();
  LogSoftmaxBackwardArguments arguments{};
  arguments.grad_output = grad.const_data_ptr();
  arguments.grad_output_type = element_of(grad);
  arguments.grad_output_stride = grad.stride(0);
  arguments.input = input.const_data_ptr();
  arguments.stride = input.stride(0);
  arguments.rows = input.size(0);
  arguments.classes = static_cast<int>(input.size(1));
  arguments.transform = of.arguments();
  arguments.largest = largest;
  arguments.sum = largest + input.size(0);
  if (need_input) {
    arguments.grad_input = grad_input.mutable_data_ptr();
    arguments.grad_stride = grad_input.stride(0);
  }
  const OnDeviceOf on(input);
  PlanRequest request = request_of(input, of);
  request.gradient = true;
  request.coefficients = sums;
  const Plan plan = make_plan(request, on.device());
  const Buffers buffers(plan, of, arguments.transform, arguments.sums, on.stream());
  launch_log_softmax_backward(plan, of.view(), element_of(input), arguments, on.stream());
  return {grad_input, sums ? buffers.total() : nothing};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_statistics(const Tensor& input, const Tensor& target,
                                                                    const Tensor& coefficients,
                                                                    c10::string_view transform, Constants constants,
                                                                    int64_t ignore_index) {
  check_rows("input", input);
  const Transform of(input, coefficients, transform, constants);
  check_beside("target", target, input, {input.size(0)}, at::kLong);
  const Tensor targets = target.contiguous();
  const auto numbers = input.options().dtype(at::kFloat), counts = input.options().dtype(at::kLong);
  const int64_t rows = input.size(0);
  Tensor log_prob = at::empty({rows}, numbers), entropy = at::empty({rows}, numbers), lse = at::empty({rows}, numbers);
  Tensor argmax = at::empty({rows}, counts), rank = at::empty({rows}, counts);
  if (rows > 0) {
    TokenStatisticsArguments arguments{input.const_data_ptr(),
                                       input.stride(0),
                                       rows,
                                       static_cast<int>(input.size(1)),
                                       targets.const_data_ptr<int64_t>(),
                                       of.arguments(),
                                       ignore_index,
                                       log_prob.mutable_data_ptr<float>(),
                                       entropy.mutable_data_ptr<float>(),
                                       lse.mutable_data_ptr<float>(),
                                       argmax.mutable_data_ptr<int64_t>(),
                                       rank.mutable_data_ptr<int64_t>()};
    const OnDeviceOf on(input);
    const Plan plan = make_plan(request_of(input, of), on.device());
    SumsArguments none{};
    const Buffers buffers(plan, of, arguments.transform, none, on.stream());
    launch_token_statistics(plan, of.view(), element_of(input), arguments, on.stream());
  }
  return {log_prob, entropy, argmax, lse, rank};
}

std::string describe_plan(const Tensor& input, c10::string_view transform, int64_t size, bool gradient,
                          bool coefficients) {
  PlanRequest request{};
  request.transform = std::string_view(transform.data(), transform.size());
  request.size = size;
  request.rows = input.size(0);
  request.classes = input.size(1);
  request.element_bytes = static_cast<int>(input.element_size());
  request.losses = true;
  request.gradient = gradient;
  request.coefficients = coefficients;
  request.deterministic = at::globalContext().deterministicAlgorithms();
  return describe(make_plan(request, OnDeviceOf(input).device()));
}

}  // namespace

TORCH_LIBRARY_IMPL(monosoftmax, MONOSOFTMAX_DISPATCH_KEY, m) {
  m.impl("cross_entropy.cuda", &cross_entropy);
  m.impl("cross_entropy_backward.cuda", &cross_entropy_backward);
  m.impl("cross_entropy_.cuda", &cross_entropy_);
  m.impl("cross_entropy_backward_.cuda", &cross_entropy_backward_);
  m.impl("cross_entropy_rescale_.cuda", &cross_entropy_rescale_);
  m.impl("scale_.cuda", &scale_);
  m.impl("token_statistics.cuda", &token_statistics);
  m.impl("log_softmax.cuda", &log_softmax);
  m.impl("log_softmax_backward.cuda", &log_softmax_backward);
  m.impl("describe_plan.cuda", &describe_plan);
}

}  // namespace monosoftmax::cuda
