// The operators of the cpu backend: they check, make the results, and call the kernels (row_kernels_impl.h) for every
// share of the rows.
#include "shares.h"

namespace monosoftmax::cpu {
namespace {

template <class Part>
Part merged(const std::vector<Part>& parts) {
  Part whole = parts.front();
  for (size_t i = 1; i < parts.size(); ++i) whole.merge(parts[i]);
  return whole;
}

// A call of cross_entropy, checked.
template <class Target>
struct LossCall {
  const Tensor& rows;
  const groups::Transform& transform;
  const TransformArguments& arguments;
  const Target& target;  // IndexArguments or ProbabilityArguments
  groups::Upstream upstream;
  groups::OutputMask mask;
  Tensor grad_rows;  // empty where it is not asked for

  at::TensorOptions numbers() const { return transform.coefficients.options(); }
  // The upstream gradient of every loss, where it is one for all. It is zero where it is absent.
  template <class S>
  S grad_of_every_loss() const {
    return upstream.loss.has_value() && upstream.loss->dim() == 0 ? *upstream.loss->template const_data_ptr<S>() : S(0);
  }
  Rows<void*> writable_grad_rows() { return rows_if(mask.rows, grad_rows); }
};

// The losses, and the gradients for one upstream gradient of every loss.
template <class Target>
groups::RowResults losses_of(LossCall<Target>& call) {
  const int64_t rows = call.rows.size(0);
  groups::RowResults result{at::empty({rows}, call.numbers()), at::empty({rows}, call.numbers()),
                            at::empty({Target::kStats, rows}, call.numbers()), call.grad_rows, Tensor()};
  const Shares shares(rows, call.rows.size(1));
  CoefficientSums sums(call.arguments, shares, call.mask.coefficients);
  with_kernels(call.rows, [&](auto zero, const auto& row_kernels) {
    using S = decltype(zero);
    const auto view = call.target.template view<S>();
    const auto& kernels = row_kernels.of(view);
    const CrossEntropyCall<S, std::decay_t<decltype(view)>> on_rows{.input = rows_of(call.rows),
                                                                    .target = view,
                                                                    .transform = call.arguments.template view<S>(),
                                                                    .loss = result.loss.template mutable_data_ptr<S>(),
                                                                    .lse = result.lse.template mutable_data_ptr<S>(),
                                                                    .stats = stats_of<S>(result.row_stats),
                                                                    .grad_loss = call.template grad_of_every_loss<S>(),
                                                                    .grad_input = call.writable_grad_rows()};
    if (!shares.by_columns()) {
      shares.for_each([&](int64_t share, int64_t begin, int64_t end) {
        kernels.cross_entropy(on_rows, sums.share(share), begin, end);
      });
      return;
    }
    const auto backward = backward_of(on_rows);
    std::vector<typename std::decay_t<decltype(view)>::Part> parts(shares.count());
    for (int64_t row = 0; row < rows; ++row) {
      on_rows.loss[row] = on_rows.lse[row] = on_rows.stats.largest[row] = on_rows.stats.sum[row] = 0;
      if (view.counts(row)) {
        shares.for_each([&](int64_t share, int64_t first, int64_t last) {
          parts[share] = kernels.scan(on_rows, row, first, last);
        });
        kernels.finish(on_rows, row, merged(parts));
      }
      if (!call.mask.any()) continue;
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        kernels.backward(backward, sums.share(share), row, row + 1, first, last);
      });
    }
  });
  result.grad_coefficients = sums.total(call.transform.coefficients, call.mask.coefficients);
  return result;
}

// The gradients, for any upstream gradients of losses and of lse, where the losses have been computed.
template <class Target>
groups::RowResults gradients_of(LossCall<Target>& call, const Tensor& row_stats) {
  const int64_t rows = call.rows.size(0);
  check_beside("row_stats", row_stats, call.rows, {Target::kStats, rows});
  const Tensor stats = row_stats.contiguous();
  Tensor grad_loss, grad_lse;
  if (call.upstream.loss.has_value() && call.upstream.loss->dim() > 0) grad_loss = call.upstream.loss->contiguous();
  if (call.upstream.lse.has_value()) grad_lse = call.upstream.lse->contiguous();
  const Shares shares(rows, call.rows.size(1));
  CoefficientSums sums(call.arguments, shares, call.mask.coefficients);
  with_kernels(call.rows, [&](auto zero, const auto& row_kernels) {
    using S = decltype(zero);
    const auto view = call.target.template view<S>();
    const auto& kernels = row_kernels.of(view);
    const CrossEntropyBackwardCall<S, std::decay_t<decltype(view)>> on_rows{
        .input = rows_of(call.rows),
        .target = view,
        .transform = call.arguments.template view<S>(),
        .grad_of_every_loss = call.template grad_of_every_loss<S>(),
        .grad_loss = grad_loss.defined() ? grad_loss.template const_data_ptr<S>() : nullptr,
        .grad_lse = grad_lse.defined() ? grad_lse.template const_data_ptr<S>() : nullptr,
        .stats = const_stats_of<S>(stats),
        .grad_input = call.writable_grad_rows()};
    for_each_block(shares, rows, call.rows.size(1), [&](auto share, auto begin, auto end, auto first, auto last) {
      kernels.backward(on_rows, sums.share(share), begin, end, first, last);
    });
  });
  return {at::empty({0}, call.numbers()), at::empty({0}, call.numbers()), at::empty({0}, call.numbers()),
          call.grad_rows, sums.total(call.transform.coefficients, call.mask.coefficients)};
}

template <class Target>
groups::RowResults results_of(LossCall<Target> call, const Optional& row_stats) {
  if (row_stats.has_value()) return gradients_of(call, *row_stats);
  const auto& [loss, lse, factor] = call.upstream;
  if (!call.mask.any() || (!lse.has_value() && (!loss.has_value() || loss->dim() == 0))) return losses_of(call);
  // The kernels that compute both have one upstream gradient.
  LossCall<Target> without_gradients = call;
  without_gradients.mask = {};
  groups::RowResults result = losses_of(without_gradients);
  result.grad_coefficients = gradients_of(call, result.row_stats).grad_coefficients;
  return result;
}

groups::RowResults cross_entropy(const Tensor& rows, const Tensor& target, const groups::Transform& transform,
                                 const groups::LossOptions& options, const std::optional<groups::Upstream>& upstream,
                                 const Optional& row_stats, groups::OutputMask mask, const Optional& grad_rows) {
  check_rows("input", rows);
  const TransformArguments arguments(transform, rows);
  check_upstream(upstream, rows, mask);
  TORCH_CHECK_VALUE(!upstream.has_value() || !upstream->factor.has_value(),
                    "monosoftmax: the cpu backend takes no factor: it knows all numbers");
  check_grad_rows(kMemory, grad_rows, rows, mask);
  const auto results = [&](const auto& checked_target) {
    return results_of<std::decay_t<decltype(checked_target)>>(
        {.rows = rows,
         .transform = transform,
         .arguments = arguments,
         .target = checked_target,
         .upstream = upstream.value_or(groups::Upstream{}),
         .mask = mask,
         .grad_rows = grad_rows.has_value() ? *grad_rows : gradient_if(mask.rows, rows)},
        row_stats);
  };
  return target.is_floating_point() ? results(ProbabilityArguments(rows, target, options))
                                    : results(IndexArguments(rows, target, options));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_statistics(const Tensor& rows, const Tensor& target,
                                                                    const groups::Transform& transform,
                                                                    int64_t ignore_index) {
  check_rows("input", rows);
  const TransformArguments arguments(transform, rows);
  const IndexArguments indices(rows, target, {.ignore_index = ignore_index});
  const auto numbers = transform.coefficients.options(), counts = target.options();
  Tensor log_prob = at::empty(target.sizes(), numbers), entropy = at::empty(target.sizes(), numbers),
         lse = at::empty(target.sizes(), numbers);
  Tensor argmax = at::empty(target.sizes(), counts), rank = at::empty(target.sizes(), counts);
  with_kernels(rows, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const TokenStatisticsCall<S> call{.input = rows_of(rows),
                                      .target = indices.view<S>().index,
                                      .classes = rows.size(1),
                                      .ignore_index = ignore_index,
                                      .transform = arguments.view<S>(),
                                      .log_prob = log_prob.mutable_data_ptr<S>(),
                                      .entropy = entropy.mutable_data_ptr<S>(),
                                      .argmax = argmax.mutable_data_ptr<int64_t>(),
                                      .lse = lse.mutable_data_ptr<S>(),
                                      .rank = rank.mutable_data_ptr<int64_t>()};
    Shares(rows.size(0), 0).for_each([&](int64_t, int64_t begin, int64_t end) {
      kernels.token_statistics(call, begin, end);
    });
  });
  return {log_prob, entropy, argmax, lse, rank};
}

std::tuple<Tensor, Tensor> log_softmax(const Tensor& rows, const groups::Transform& transform, at::ScalarType dtype) {
  check_rows("input", rows);
  element_of(dtype);
  const TransformArguments arguments(transform, rows);
  Tensor output = at::empty(rows.sizes(), rows.options().dtype(dtype));
  Tensor row_stats = at::empty({2, rows.size(0)}, transform.coefficients.options());
  with_kernels(rows, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const LogSoftmaxCall<S> call{.input = rows_of(rows),
                                 .classes = rows.size(1),
                                 .transform = arguments.view<S>(),
                                 .output = rows_if(true, output),
                                 .stats = stats_of<S>(row_stats)};
    const Shares shares(rows.size(0), rows.size(1));
    if (!shares.by_columns()) {
      shares.for_each([&](int64_t, int64_t begin, int64_t end) { kernels.log_softmax(call, begin, end); });
      return;
    }
    std::vector<OnlineSoftmax<S>> parts(shares.count());
    for (int64_t row = 0; row < rows.size(0); ++row) {
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        parts[share] = kernels.log_softmax_scan(call, row, first, last);
      });
      const OnlineSoftmax<S> whole = merged(parts);
      shares.for_each(
          [&](int64_t, int64_t first, int64_t last) { kernels.log_softmax_finish(call, row, whole, first, last); });
    }
  });
  return {output, row_stats};
}

std::tuple<Tensor, Tensor> log_softmax_backward(const Tensor& grad_output, const Tensor& input,
                                                const groups::Transform& transform, const Tensor& row_stats,
                                                groups::OutputMask mask) {
  check_rows("input", input);
  const Tensor grad = checked_like(input, "grad_output", grad_output);
  const TransformArguments arguments(transform, input);
  const int64_t rows = input.size(0), columns = input.size(1);
  check_beside("row_stats", row_stats, input, {2, rows});
  const Tensor stats = row_stats.contiguous();
  Tensor grad_input = gradient_if(mask.rows, input);
  const Shares shares(rows, columns);
  CoefficientSums sums(arguments, shares, mask.coefficients);
  std::vector<double> parts(shares.count() * rows, 0.0), grad_sum(rows, 0.0);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    for_each_block(shares, rows, columns, [&](auto share, auto begin, auto end, auto first, auto last) {
      for (int64_t row = begin; row < end; ++row) {
        parts[share * rows + row] = kernels.sum_of_row(rows_of(grad), row, first, last);
      }
    });
    for (size_t i = 0; i < parts.size(); ++i) grad_sum[i % rows] += parts[i];
    const LogSoftmaxBackwardCall<S> call{.grad_output = rows_of(grad),
                                         .input = rows_of(input),
                                         .classes = columns,
                                         .transform = arguments.view<S>(),
                                         .stats = const_stats_of<S>(stats),
                                         .grad_sum = grad_sum.data(),
                                         .grad_input = rows_if(mask.rows, grad_input)};
    for_each_block(shares, rows, columns, [&](auto share, auto begin, auto end, auto first, auto last) {
      kernels.log_softmax_backward(call, sums.share(share), begin, end, first, last);
    });
  });
  return {grad_input, sums.total(transform.coefficients, mask.coefficients)};
}

}  // namespace

const RowOperators kRowOperators{&cross_entropy, &token_statistics, &log_softmax, &log_softmax_backward};

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
