// The operators of the cpu backend. They check their arguments, allocate the results, and call the kernels
// (row_kernels_impl.h) for every share of the rows.
#include "shares.h"

namespace monosoftmax::cpu {
namespace {

template <class Part>
Part merged(const std::vector<Part>& parts) {
  Part whole = parts.front();
  for (size_t i = 1; i < parts.size(); ++i) whole.merge(parts[i]);
  return whole;
}

// The upstream gradient of every loss, if all losses have the same. It is 0 if there is none.
template <class S>
S grad_of_every_loss(const groups::Upstream& upstream) {
  return upstream.loss.has_value() && upstream.loss->dim() == 0 ? *upstream.loss->const_data_ptr<S>() : S(0);
}

// The upstream gradients of the losses, if each has its own.
Optional grad_of_each_loss(const groups::Upstream& upstream) {
  return upstream.loss.has_value() && upstream.loss->dim() > 0 ? contiguous(upstream.loss) : std::nullopt;
}

void check_gradients(const Tensor& rows, const std::optional<groups::Upstream>& upstream, groups::OutputMask mask,
                     const Optional& grad_rows) {
  check_upstream(upstream, rows, mask);
  TORCH_CHECK_VALUE(!upstream.has_value() || !upstream->factor.has_value(),
                    "monosoftmax: the cpu backend takes no factor: it knows all numbers");
  check_grad_rows(kMemory, grad_rows, rows, mask);
}

// A call of cross_entropy, checked. Target: IndexArguments or ProbabilityArguments.
template <class Target>
struct LossCall {
  const Tensor& rows;
  const TransformArguments& transform;
  const Target& target;
  groups::Upstream upstream;
  groups::OutputMask mask;

  bool has_one_upstream_gradient() const {
    return !upstream.lse.has_value() && (!upstream.loss.has_value() || upstream.loss->dim() == 0);
  }
};

// Computes the losses, and the gradients if all losses have the same upstream gradient.
template <class Target>
void compute_losses(const LossCall<Target>& call, groups::RowResults& results) {
  const int64_t rows = call.rows.size(0);
  const Shares shares(rows, call.rows.size(1));
  CoefficientSums sums(call.transform, shares, call.mask.coefficients);
  with_kernels(call.rows, [&](auto zero, const auto& row_kernels) {
    using S = decltype(zero);
    const auto view = call.target.template view<S>();
    const auto& kernels = row_kernels.of(view);
    const CrossEntropyCall<S, std::decay_t<decltype(view)>> on_rows{
        .input = rows_of(call.rows),
        .target = view,
        .transform = call.transform.template view<S>(),
        .loss = results.loss.template mutable_data_ptr<S>(),
        .lse = results.lse.template mutable_data_ptr<S>(),
        .stats = stats_of<S>(results.row_stats),
        .grad_loss = grad_of_every_loss<S>(call.upstream),
        .grad_input = rows_if(call.mask.rows, results.grad_rows)};
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
  results.grad_coefficients = sums.total();
}

// Computes the gradients from the row_stats of the losses, for any upstream gradients.
template <class Target>
void compute_gradients(const LossCall<Target>& call, const Tensor& row_stats, groups::RowResults& results) {
  const Tensor stats = row_stats.contiguous();
  const Optional grad_loss = grad_of_each_loss(call.upstream);
  const Optional grad_lse = contiguous(call.upstream.lse), grad_entropy = contiguous(call.upstream.entropy);
  const Shares shares(call.rows.size(0), call.rows.size(1));
  CoefficientSums sums(call.transform, shares, call.mask.coefficients);
  with_kernels(call.rows, [&](auto zero, const auto& row_kernels) {
    using S = decltype(zero);
    const auto view = call.target.template view<S>();
    const auto& kernels = row_kernels.of(view);
    const CrossEntropyBackwardCall<S, std::decay_t<decltype(view)>> on_rows{
        .input = rows_of(call.rows),
        .target = view,
        .transform = call.transform.template view<S>(),
        .grad_of_every_loss = grad_of_every_loss<S>(call.upstream),
        .grad_loss = data_of<S>(grad_loss),
        .grad_lse = data_of<S>(grad_lse),
        .grad_entropy = data_of<S>(grad_entropy),
        .stats = const_stats_of<S>(stats),
        .grad_input = rows_if(call.mask.rows, results.grad_rows)};
    for_each_block(shares, call.rows, [&](auto share, auto begin, auto end, auto first, auto last) {
      kernels.backward(on_rows, sums.share(share), begin, end, first, last);
    });
  });
  results.grad_coefficients = sums.total();
}

groups::RowResults cross_entropy(const Tensor& rows, const Tensor& target, const groups::Transform& transform,
                                 const groups::LossOptions& options, const std::optional<groups::Upstream>& upstream,
                                 const Optional& row_stats, groups::OutputMask mask, const Optional& grad_rows) {
  check_rows("input", rows);
  const TransformArguments arguments(transform, rows);
  check_gradients(rows, upstream, mask, grad_rows);
  const bool has_entropy = upstream.has_value() && upstream->entropy.has_value();
  TORCH_CHECK_VALUE(!has_entropy || !target.is_floating_point(),
                    "monosoftmax: a gradient of the entropy needs a target of class indices");
  TORCH_CHECK_VALUE(!has_entropy || (row_stats.has_value() && row_stats->dim() == 2 && row_stats->size(0) == 3),
                    "monosoftmax: a gradient of the entropy needs the row_stats [3, N] of token_statistics");
  const auto compute = [&](const auto& checked_target) {
    using Target = std::decay_t<decltype(checked_target)>;
    const bool has_most = row_stats.has_value() && row_stats->dim() == 2 && row_stats->size(0) == Target::kMostStats;
    groups::RowResults results = room_for_losses(rows, has_most ? Target::kMostStats : Target::kStats, row_stats);
    results.grad_rows = grad_rows.has_value() ? *grad_rows : gradient_if(mask.rows, rows);
    LossCall<Target> call{rows, arguments, checked_target, upstream.value_or(groups::Upstream{}), mask};
    // The kernels that compute losses and gradients together take one upstream gradient for all losses.
    const bool losses_first = mask.any() && !call.has_one_upstream_gradient();
    if (losses_first) call.mask = {};
    if (!row_stats.has_value()) compute_losses(call, results);
    call.mask = mask;
    if (row_stats.has_value() || losses_first) compute_gradients(call, row_stats.value_or(results.row_stats), results);
    return results;
  };
  return target.is_floating_point() ? compute(ProbabilityArguments(rows, target, options))
                                    : compute(IndexArguments(rows, target, options));
}

groups::TokenStatistics token_statistics(const Tensor& rows, const Tensor& target, const groups::Transform& transform,
                                         int64_t ignore_index) {
  check_rows("input", rows);
  const TransformArguments arguments(transform, rows);
  const IndexArguments indices(rows, target, {.ignore_index = ignore_index});
  groups::TokenStatistics results = room_for_statistics(rows);
  with_kernels(rows, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    auto& [log_prob, entropy, argmax, lse, rank, row_stats] = results;
    const TokenStatisticsCall<S> call{.input = rows_of(rows),
                                      .target = indices.view<S>().index,
                                      .classes = rows.size(1),
                                      .ignore_index = ignore_index,
                                      .transform = arguments.view<S>(),
                                      .log_prob = log_prob.mutable_data_ptr<S>(),
                                      .entropy = entropy.mutable_data_ptr<S>(),
                                      .argmax = argmax.mutable_data_ptr<int64_t>(),
                                      .lse = lse.mutable_data_ptr<S>(),
                                      .rank = rank.mutable_data_ptr<int64_t>(),
                                      .stats = stats_of<S>(row_stats)};
    Shares(rows.size(0), 0).for_each([&](int64_t, int64_t begin, int64_t end) {
      kernels.token_statistics(call, begin, end);
    });
  });
  return results;
}

// Computes the divergences, and their gradients with any upstream gradients.
void compute_divergences(const Tensor& rows, const DivergenceArguments& divergence, const TransformArguments& transform,
                         const groups::Upstream& upstream, groups::OutputMask mask, const Optional& row_stats,
                         groups::RowResults& results) {
  const Tensor stats = row_stats.has_value() ? row_stats->contiguous() : results.row_stats;
  const Optional grad_loss = grad_of_each_loss(upstream);
  const Shares shares(rows.size(0), rows.size(1));
  CoefficientSums sums(transform, shares, mask.coefficients);
  with_kernels(rows, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const DenseBackwardCall<S> backward{.input = rows_of(rows),
                                        .dense = rows_of(divergence.log_q()),
                                        .divergence = &divergence.tiles(kernels),
                                        .beta = static_cast<S>(divergence.beta()),
                                        .transform = transform.view<S>(),
                                        .stats = const_stats_of<S>(stats),
                                        .grad_sum = nullptr,
                                        .grad_of_every_loss = grad_of_every_loss<S>(upstream),
                                        .grad_loss = data_of<S>(grad_loss),
                                        .grad_input = rows_if(mask.rows, results.grad_rows)};
    if (row_stats.has_value()) {
      for_each_block(shares, rows, [&](auto share, auto begin, auto end, auto first, auto last) {
        kernels.dense_backward(backward, sums.share(share), begin, end, first, last);
      });
      return;
    }
    const DivergenceCall<S> call{.backward = backward,
                                 .classes = rows.size(1),
                                 .loss = results.loss.template mutable_data_ptr<S>(),
                                 .lse = results.lse.template mutable_data_ptr<S>(),
                                 .stats = stats_of<S>(results.row_stats)};
    if (!shares.by_columns()) {
      shares.for_each(
          [&](int64_t share, int64_t begin, int64_t end) { kernels.divergence(call, sums.share(share), begin, end); });
      return;
    }
    std::vector<OnlineSoftmax<S>> softmaxes(shares.count());
    std::vector<DivergenceSums> parts(shares.count());
    for (int64_t row = 0; row < rows.size(0); ++row) {
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        softmaxes[share] = kernels.softmax_scan(backward.input, backward.transform, row, first, last);
      });
      const OnlineSoftmax<S> whole = merged(softmaxes);
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        parts[share] = kernels.divergence_scan(call, row, whole, first, last);
      });
      kernels.divergence_finish(call, row, whole, merged(parts));
      if (!mask.any()) continue;
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        kernels.dense_backward(backward, sums.share(share), row, row + 1, first, last);
      });
    }
  });
  results.grad_coefficients = sums.total();
}

groups::RowResults divergence(const Tensor& rows, const Tensor& log_target, const groups::Transform& transform,
                              const groups::Divergence& given, const std::optional<groups::Upstream>& upstream,
                              const Optional& row_stats, groups::OutputMask mask, const Optional& grad_rows) {
  check_rows("input", rows);
  const TransformArguments arguments(transform, rows);
  const DivergenceArguments checked(rows, log_target, given);
  check_gradients(rows, upstream, mask, grad_rows);
  groups::RowResults results = room_for_losses(rows, DivergenceArguments::kStats, row_stats);
  results.grad_rows = grad_rows.has_value() ? *grad_rows : gradient_if(mask.rows, rows);
  compute_divergences(rows, checked, arguments, upstream.value_or(groups::Upstream{}), mask, row_stats, results);
  return results;
}

std::tuple<Tensor, Tensor> log_softmax(const Tensor& rows, const groups::Transform& transform, at::ScalarType dtype,
                                       const Optional& out) {
  check_rows("input", rows);
  element_of(dtype);
  const TransformArguments arguments(transform, rows);
  Tensor output = output_for(kMemory, out, rows, dtype);
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
        parts[share] = kernels.softmax_scan(call.input, call.transform, row, first, last);
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
  const Tensor grad = checked_like(kMemory, "grad_output", grad_output, input);
  const TransformArguments arguments(transform, input);
  const int64_t rows = input.size(0);
  check_beside("row_stats", row_stats, input, {2, rows});
  const Tensor stats = row_stats.contiguous();
  Tensor grad_input = gradient_if(mask.rows, input);
  const Shares shares(rows, input.size(1));
  CoefficientSums sums(arguments, shares, mask.coefficients);
  std::vector<double> parts(shares.count() * rows, 0.0), grad_sum(rows, 0.0);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    for_each_block(shares, input, [&](auto share, auto begin, auto end, auto first, auto last) {
      for (int64_t row = begin; row < end; ++row) {
        parts[share * rows + row] = kernels.sum_of_row(rows_of(grad), row, first, last);
      }
    });
    for (size_t i = 0; i < parts.size(); ++i) grad_sum[i % rows] += parts[i];
    const DenseBackwardCall<S> call{.input = rows_of(input),
                                    .dense = rows_of(grad),
                                    .divergence = nullptr,
                                    .beta = 0,
                                    .transform = arguments.view<S>(),
                                    .stats = const_stats_of<S>(stats),
                                    .grad_sum = grad_sum.data(),
                                    .grad_of_every_loss = 0,
                                    .grad_loss = nullptr,
                                    .grad_input = rows_if(mask.rows, grad_input)};
    for_each_block(shares, input, [&](auto share, auto begin, auto end, auto first, auto last) {
      kernels.dense_backward(call, sums.share(share), begin, end, first, last);
    });
  });
  return {grad_input, sums.total()};
}

}  // namespace

const RowOperators kRowOperators{
    &cross_entropy,     &token_statistics,          &divergence, &log_softmax, &log_softmax_backward,
    &plif_coefficients, &plif_coefficients_backward};

}  // namespace monosoftmax::cpu
