// The operators of the cpu backend: outputs, and the calls of the kernels for every share of the rows. The schemas are
// in monosoftmax/ops.py, the kernels in row_kernels_impl.h.
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <tuple>

#include "shares.h"

namespace monosoftmax::cpu {
namespace {

template <class Part>
Part merged(const std::vector<Part>& parts) {
  Part whole = parts.front();
  for (size_t i = 1; i < parts.size(); ++i) whole.merge(parts[i]);
  return whole;
}

struct Losses {
  Tensor loss, lse, row_stats, grad_coefficients;
};

// The losses of rows and, with a scale, the gradients of scale * their sum: of the coefficients where they are needed,
// of input where grad_input is given. Target: IndexArguments or ProbabilityArguments.
template <class Target>
Losses losses_of(const Tensor& input, const Target& target, const TransformArguments& transform, const Optional& scale,
                 Tensor* grad_input, const Tensor& coefficients, bool need_coefficients) {
  const int64_t rows = input.size(0);
  const auto type = input.options().dtype(arithmetic_type(input));
  Losses result{at::empty({rows}, type), at::empty({rows}, type), at::empty({Target::kStats, rows}, type), {}};
  const Shares shares(rows, input.size(1));
  CoefficientSums sums(transform, shares, need_coefficients);
  with_kernels(input, [&](auto zero, const auto& row_kernels) {
    using S = decltype(zero);
    const auto view = target.template view<S>();
    const auto& kernels = row_kernels.of(view);
    const CrossEntropyCall<S, std::decay_t<decltype(view)>> call{rows_of(input),
                                                                 view,
                                                                 transform.view<S>(),
                                                                 result.loss.mutable_data_ptr<S>(),
                                                                 result.lse.mutable_data_ptr<S>(),
                                                                 stats_of<S>(result.row_stats),
                                                                 scale.has_value() ? scale->item<S>() : S(0),
                                                                 rows_or_none(grad_input, input)};
    if (!shares.by_columns()) {
      shares.for_each([&](int64_t share, int64_t begin, int64_t end) {
        kernels.cross_entropy(call, sums.share(share), begin, end);
      });
      return;
    }
    const bool has_gradient = grad_input != nullptr || need_coefficients;
    const auto backward = backward_of(call);
    std::vector<typename std::decay_t<decltype(view)>::Part> parts(shares.count());
    for (int64_t row = 0; row < rows; ++row) {
      call.loss[row] = call.lse[row] = call.stats.largest[row] = call.stats.sum[row] = 0;
      if (view.counts(row)) {
        shares.for_each(
            [&](int64_t share, int64_t first, int64_t last) { parts[share] = kernels.scan(call, row, first, last); });
        kernels.finish(call, row, merged(parts));
      }
      if (!has_gradient) continue;
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        kernels.backward(backward, sums.share(share), row, row + 1, first, last);
      });
    }
  });
  result.grad_coefficients = sums.total(coefficients, need_coefficients);
  return result;
}

using LossesAndGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Target>
LossesAndGradients with_total_and_gradients(const Tensor& input, const Target& target,
                                            const TransformArguments& transform, const Optional& scale, bool need_input,
                                            const Tensor& coefficients, bool need_coefficients) {
  check_scale(scale, input, need_input || need_coefficients);
  Tensor grad_input = need_input ? empty_gradient(input) : at::empty({0}, input.options());
  Losses losses =
      losses_of(input, target, transform, scale, need_input ? &grad_input : nullptr, coefficients, need_coefficients);
  Tensor total = scale.has_value() ? losses.loss.sum().mul(*scale) : at::empty({0}, losses.loss.options());
  return {losses.loss, losses.lse, losses.row_stats, total, grad_input, losses.grad_coefficients};
}

LossesAndGradients cross_entropy(const Tensor& input, const Tensor& target, const Optional& weight,
                                 const Tensor& coefficients, c10::string_view transform, Constants constants,
                                 int64_t ignore_index, double label_smoothing, double z_loss, bool return_lse,
                                 const Optional& scale, bool need_input, bool need_coefficients) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const IndexArguments indices(input, target, weight, ignore_index, label_smoothing, z_loss, return_lse);
  return with_total_and_gradients(input, indices, arguments, scale, need_input, coefficients, need_coefficients);
}

// return_lse: whether lse is differentiated, which is for the derivative of the operator to know.
LossesAndGradients cross_entropy_of_probabilities(const Tensor& input, const Tensor& target, const Optional& weight,
                                                  const Tensor& coefficients, c10::string_view transform,
                                                  Constants constants, double label_smoothing, double z_loss,
                                                  bool /*return_lse*/, const Optional& scale, bool need_input,
                                                  bool need_coefficients) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const ProbabilityArguments probabilities(input, target, weight, label_smoothing, z_loss);
  return with_total_and_gradients(input, probabilities, arguments, scale, need_input, coefficients, need_coefficients);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_(Tensor& input, const Tensor& target, const Optional& weight,
                                                          const Tensor& coefficients, c10::string_view transform,
                                                          Constants constants, int64_t ignore_index,
                                                          double label_smoothing, double z_loss, bool return_lse,
                                                          const Tensor& scale, bool need_coefficients) {
  check_scale(scale, input, true);
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const IndexArguments indices(input, target, weight, ignore_index, label_smoothing, z_loss, return_lse);
  Losses losses = losses_of(input, indices, arguments, scale, &input, coefficients, need_coefficients);
  return {losses.loss, losses.lse, losses.row_stats, losses.grad_coefficients};
}

// The gradient of the coefficients, and into grad_input, where it is given, that of input.
template <class Target>
Tensor gradients_of(const Optional& grad_loss, const Optional& grad_lse, const Tensor& input, const Target& target,
                    const TransformArguments& transform, const Tensor& row_stats, Tensor* grad_input,
                    const Tensor& coefficients, bool need_coefficients) {
  const int64_t rows = input.size(0);
  check_arithmetic("row_stats", row_stats, input, {Target::kStats, rows});
  const Tensor stats = row_stats.contiguous();
  Tensor upstream[2];
  const char* names[2] = {"grad_loss", "grad_lse"};
  const Optional* given[2] = {&grad_loss, &grad_lse};
  for (int i = 0; i < 2; ++i) {
    if (!given[i]->has_value()) continue;
    check_arithmetic(names[i], **given[i], input, {rows});
    upstream[i] = (*given[i])->contiguous();
  }
  const Shares shares(rows, input.size(1));
  CoefficientSums sums(transform, shares, need_coefficients);
  with_kernels(input, [&](auto zero, const auto& row_kernels) {
    using S = decltype(zero);
    const auto view = target.template view<S>();
    const auto& kernels = row_kernels.of(view);
    const CrossEntropyBackwardCall<S, std::decay_t<decltype(view)>> call{
        rows_of(input),
        view,
        transform.view<S>(),
        S(0),
        upstream[0].defined() ? upstream[0].const_data_ptr<S>() : nullptr,
        upstream[1].defined() ? upstream[1].const_data_ptr<S>() : nullptr,
        const_stats_of<S>(stats),
        rows_or_none(grad_input, input)};
    for_each_block(shares, rows, input.size(1), [&](auto share, auto begin, auto end, auto first, auto last) {
      kernels.backward(call, sums.share(share), begin, end, first, last);
    });
  });
  return sums.total(coefficients, need_coefficients);
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Optional& grad_loss, const Optional& grad_lse,
                                                  const Tensor& input, const Tensor& target, const Optional& weight,
                                                  const Tensor& coefficients, c10::string_view transform,
                                                  Constants constants, const Tensor& row_stats, int64_t ignore_index,
                                                  double label_smoothing, double z_loss, bool need_input,
                                                  bool need_coefficients) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const IndexArguments indices(input, target, weight, ignore_index, label_smoothing, z_loss, false);
  Tensor grad_input = need_input ? empty_gradient(input) : at::empty({0}, input.options());
  const Tensor grad_coefficients = gradients_of(grad_loss, grad_lse, input, indices, arguments, row_stats,
                                                need_input ? &grad_input : nullptr, coefficients, need_coefficients);
  return {grad_input, grad_coefficients};
}

std::tuple<Tensor, Tensor> cross_entropy_of_probabilities_backward(
    const Optional& grad_loss, const Optional& grad_lse, const Tensor& input, const Tensor& target,
    const Optional& weight, const Tensor& coefficients, c10::string_view transform, Constants constants,
    const Tensor& row_stats, double label_smoothing, double z_loss, bool need_input, bool need_coefficients) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const ProbabilityArguments probabilities(input, target, weight, label_smoothing, z_loss);
  Tensor grad_input = need_input ? empty_gradient(input) : at::empty({0}, input.options());
  const Tensor grad_coefficients = gradients_of(grad_loss, grad_lse, input, probabilities, arguments, row_stats,
                                                need_input ? &grad_input : nullptr, coefficients, need_coefficients);
  return {grad_input, grad_coefficients};
}

Tensor cross_entropy_backward_(const Optional& grad_loss, const Optional& grad_lse, Tensor& input, const Tensor& target,
                               const Optional& weight, const Tensor& coefficients, c10::string_view transform,
                               Constants constants, const Tensor& row_stats, int64_t ignore_index,
                               double label_smoothing, double z_loss, bool need_coefficients) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const IndexArguments indices(input, target, weight, ignore_index, label_smoothing, z_loss, false);
  return gradients_of(grad_loss, grad_lse, input, indices, arguments, row_stats, &input, coefficients,
                      need_coefficients);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_statistics(const Tensor& input, const Tensor& target,
                                                                    const Tensor& coefficients,
                                                                    c10::string_view transform, Constants constants,
                                                                    int64_t ignore_index) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const IndexArguments indices(input, target, {}, ignore_index, 0, 0, false);
  const int64_t rows = input.size(0);
  const auto type = input.options().dtype(arithmetic_type(input));
  const auto count = input.options().dtype(at::kLong);
  Tensor log_prob = at::empty({rows}, type), entropy = at::empty({rows}, type), lse = at::empty({rows}, type);
  Tensor argmax = at::empty({rows}, count), rank = at::empty({rows}, count);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const TokenStatisticsCall<S> call{rows_of(input),
                                      indices.view<S>().index,
                                      input.size(1),
                                      ignore_index,
                                      arguments.view<S>(),
                                      log_prob.mutable_data_ptr<S>(),
                                      entropy.mutable_data_ptr<S>(),
                                      argmax.mutable_data_ptr<int64_t>(),
                                      lse.mutable_data_ptr<S>(),
                                      rank.mutable_data_ptr<int64_t>()};
    Shares(rows, 0).for_each([&](int64_t, int64_t begin, int64_t end) { kernels.token_statistics(call, begin, end); });
  });
  return {log_prob, entropy, argmax, lse, rank};
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
    const LogSoftmaxCall<S> call{rows_of(input), input.size(1), arguments.view<S>(), writable_rows_of(output),
                                 stats_of<S>(row_stats)};
    const Shares shares(rows, input.size(1));
    if (!shares.by_columns()) {
      shares.for_each([&](int64_t, int64_t begin, int64_t end) { kernels.log_softmax(call, begin, end); });
      return;
    }
    std::vector<OnlineSoftmax<S>> parts(shares.count());
    for (int64_t row = 0; row < rows; ++row) {
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        parts[share] = kernels.log_softmax_scan(call, row, first, last);
      });
      for (size_t i = 1; i < parts.size(); ++i) parts[0].merge(parts[i]);
      shares.for_each(
          [&](int64_t, int64_t first, int64_t last) { kernels.log_softmax_finish(call, row, parts[0], first, last); });
    }
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
  Tensor grad_input = need_input ? empty_gradient(input) : at::empty({0}, input.options());
  const Shares shares(rows, input.size(1));
  CoefficientSums sums(arguments, shares, need_coefficients);
  std::vector<double> parts(shares.count() * rows, 0.0), grad_sum(rows, 0.0);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const Rows<const void*> upstream = rows_of(grad);
    for_each_block(shares, rows, input.size(1), [&](auto share, auto begin, auto end, auto first, auto last) {
      for (int64_t row = begin; row < end; ++row) {
        parts[share * rows + row] = kernels.sum_of_row(upstream, row, first, last);
      }
    });
    for (size_t i = 0; i < parts.size(); ++i) grad_sum[i % rows] += parts[i];
    const LogSoftmaxBackwardCall<S> call{upstream,
                                         rows_of(input),
                                         input.size(1),
                                         arguments.view<S>(),
                                         const_stats_of<S>(stats),
                                         grad_sum.data(),
                                         rows_or_none(need_input ? &grad_input : nullptr, input)};
    for_each_block(shares, rows, input.size(1), [&](auto share, auto begin, auto end, auto first, auto last) {
      kernels.log_softmax_backward(call, sums.share(share), begin, end, first, last);
    });
  });
  return {grad_input, sums.total(coefficients, need_coefficients)};
}

}  // namespace

TORCH_LIBRARY_IMPL(monosoftmax, CPU, m) {
  m.impl("cross_entropy.cpu", &cross_entropy);
  m.impl("cross_entropy_backward.cpu", &cross_entropy_backward);
  m.impl("cross_entropy_of_probabilities.cpu", &cross_entropy_of_probabilities);
  m.impl("cross_entropy_of_probabilities_backward.cpu", &cross_entropy_of_probabilities_backward);
  m.impl("cross_entropy_.cpu", &cross_entropy_);
  m.impl("cross_entropy_backward_.cpu", &cross_entropy_backward_);
  m.impl("token_statistics.cpu", &token_statistics);
  m.impl("log_softmax.cpu", &log_softmax);
  m.impl("log_softmax_backward.cpu", &log_softmax_backward);
}

}  // namespace monosoftmax::cpu
