// The operators of the cpu backend: checks, outputs, and the division of rows among torch's threads. The schemas are in
// monosoftmax/ops.py, the kernels in row_kernels_impl.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef MONOSOFTMAX_X86
#include <xmmintrin.h>
#endif

#include <tuple>
#include <vector>

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

Rows<const void*> rows_of(const Tensor& rows) {
  return {rows.const_data_ptr(), element_of(rows.scalar_type()), rows.stride(0)};
}

Rows<void*> writable_rows_of(Tensor& rows) {
  return {rows.mutable_data_ptr(), element_of(rows.scalar_type()), rows.stride(0)};
}

void check_scale(const Optional& scale, const Tensor& input, bool needed) {
  if (scale.has_value()) check_arithmetic("scale", *scale, input, {});
  TORCH_CHECK_VALUE(scale.has_value() || !needed, "monosoftmax: gradients need a scale");
}

// While it lives, this thread rounds results below the smallest normal number to 0: probabilities that small are
// common, and x86 processors take a hundred cycles for each.
class FlushSubnormals {
#ifdef MONOSOFTMAX_X86
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#endif
};

// The rows of a call are divided into one contiguous share a thread, whatever the grain of the work: sums over the
// shares are then the same in every run with as many threads. Where there are fewer rows than threads, the columns of
// each row are divided instead, if they are enough to be worth it.
class Shares {
 public:
  Shares(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        by_columns_(rows < at::get_num_threads() && columns >= 2 * kFewestColumns),
        count_(by_columns_ ? std::min<int64_t>(columns / kFewestColumns, at::get_num_threads())
                           : std::min<int64_t>(rows, at::get_num_threads())) {}

  int64_t count() const { return count_; }
  bool by_columns() const { return by_columns_; }
  // work(share, begin, end) with the rows of each share, or the columns of each share of a row
  template <class Work>
  void for_each(Work&& work) const {
    const int64_t units = by_columns_ ? columns_ : rows_;
    at::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      const FlushSubnormals flush;
      for (int64_t share = first; share < last; ++share) {
        work(share, begin_of(share, units), begin_of(share + 1, units));
      }
    });
  }

 private:
  static constexpr int64_t kFewestColumns = 4096;
  int64_t begin_of(int64_t share, int64_t units) const { return units * share / count_; }

  int64_t rows_, columns_;
  bool by_columns_;
  int64_t count_;
};

// The double precision sums of coefficient gradients, one set a share.
class CoefficientSums {
 public:
  CoefficientSums(const TransformArguments& transform, const Shares& shares, bool needed)
      : table_rows_(transform.table_rows()) {
    const Tensor& like = transform.coefficients();
    if (needed && like.numel() > 0) {
      std::vector<int64_t> sizes = like.sizes().vec();
      sizes.insert(sizes.begin(), shares.count());
      sums_ = at::zeros(sizes, like.options().dtype(at::kDouble));
    }
  }
  double* share(int64_t index) {
    return sums_.defined() ? sums_.mutable_data_ptr<double>() + index * sums_.stride(0) : nullptr;
  }
  Tensor total(const Tensor& coefficients, bool needed) const {
    if (!needed) return at::empty({0}, coefficients.options());
    if (!sums_.defined()) return at::empty_like(coefficients);
    const Tensor total = sums_.sum(0).to(coefficients.scalar_type());
    return table_rows_ == 0 ? total : total.narrow(1, 0, table_rows_).t().contiguous();
  }

 private:
  int table_rows_;
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

// work(share, begin, end, first, last) for the rows [begin, end) and columns [first, last) of every share.
template <class Work>
void for_each_block(const Shares& shares, int64_t rows, int64_t columns, Work&& work) {
  if (!shares.by_columns()) {
    shares.for_each([&](int64_t share, int64_t begin, int64_t end) { work(share, begin, end, 0, columns); });
    return;
  }
  shares.for_each([&](int64_t share, int64_t first, int64_t last) { work(share, 0, rows, first, last); });
}

// The gradient of rows: new memory, whose pages the kernels are the first to touch. In pages of 2 MiB, where the system
// has them for who asks, that takes a fraction of the time: 4 KiB pages cost as much as the arithmetic.
Tensor empty_gradient(const Tensor& input) {
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

Rows<void*> rows_or_none(Tensor* rows, const Tensor& like) {
  return rows == nullptr ? Rows<void*>{nullptr, element_of(like.scalar_type()), 0} : writable_rows_of(*rows);
}

template <class S>
RowPart<S> merged(const std::vector<RowPart<S>>& parts) {
  RowPart<S> whole = parts.front();
  for (size_t i = 1; i < parts.size(); ++i) {
    whole.softmax.merge(parts[i].softmax);
    whole.target_y += parts[i].target_y;
    whole.weighted += parts[i].weighted;
  }
  return whole;
}

struct Losses {
  Tensor loss, lse, row_stats, grad_coefficients;
};

// The losses of rows and, with a scale, the gradients of scale * their sum: of the coefficients where they are needed,
// of input where grad_input is given.
Losses losses_of(const Tensor& input, const Tensor& target, const Optional& weight, const Tensor& coefficients,
                 c10::string_view transform, Constants constants, int64_t ignore_index, double label_smoothing,
                 double z_loss, bool return_lse, const Optional& scale, Tensor* grad_input, bool need_coefficients) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const LossArguments options(input, target, weight, ignore_index, label_smoothing, z_loss);
  const int64_t rows = input.size(0);
  const auto type = input.options().dtype(arithmetic_type(input));
  Losses result{at::empty({rows}, type), at::empty({rows}, type), at::empty({2, rows}, type), {}};
  const Shares shares(rows, input.size(1));
  CoefficientSums sums(arguments, shares, need_coefficients);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const CrossEntropyCall<S> call{rows_of(input),
                                   options.target.const_data_ptr<int64_t>(),
                                   arguments.view<S>(),
                                   options.view<S>(),
                                   return_lse,
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
    const CrossEntropyBackwardCall<S> backward{
        call.input,     call.target, call.transform, call.options,
        call.grad_loss, nullptr,     nullptr,        {call.stats.largest, call.stats.sum},
        call.grad_input};
    std::vector<RowPart<S>> parts(shares.count());
    for (int64_t row = 0; row < rows; ++row) {
      call.loss[row] = call.lse[row] = call.stats.largest[row] = call.stats.sum[row] = 0;
      if (call.target[row] != ignore_index || return_lse) {
        shares.for_each([&](int64_t share, int64_t first, int64_t last) {
          parts[share] = kernels.cross_entropy_scan(call, row, first, last);
        });
        kernels.cross_entropy_finish(call, row, merged(parts));
      }
      if (!has_gradient) continue;
      shares.for_each([&](int64_t share, int64_t first, int64_t last) {
        kernels.cross_entropy_backward(backward, sums.share(share), row, row + 1, first, last);
      });
    }
  });
  result.grad_coefficients = sums.total(coefficients, need_coefficients);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& input, const Tensor& target, const Optional& weight, const Tensor& coefficients,
    c10::string_view transform, Constants constants, int64_t ignore_index, double label_smoothing, double z_loss,
    bool return_lse, const Optional& scale, bool need_input, bool need_coefficients) {
  check_scale(scale, input, need_input || need_coefficients);
  Tensor grad_input = need_input ? empty_gradient(input) : at::empty({0}, input.options());
  Losses losses = losses_of(input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing,
                            z_loss, return_lse, scale, need_input ? &grad_input : nullptr, need_coefficients);
  Tensor total = scale.has_value() ? losses.loss.sum().mul(*scale) : at::empty({0}, losses.loss.options());
  return {losses.loss, losses.lse, losses.row_stats, total, grad_input, losses.grad_coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_(Tensor& input, const Tensor& target, const Optional& weight,
                                                          const Tensor& coefficients, c10::string_view transform,
                                                          Constants constants, int64_t ignore_index,
                                                          double label_smoothing, double z_loss, bool return_lse,
                                                          const Tensor& scale, bool need_coefficients) {
  check_scale(scale, input, true);
  Losses losses = losses_of(input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing,
                            z_loss, return_lse, scale, &input, need_coefficients);
  return {losses.loss, losses.lse, losses.row_stats, losses.grad_coefficients};
}

// The gradient of the coefficients, and into grad_input, where it is given, that of input.
Tensor backward_of(const Optional& grad_loss, const Optional& grad_lse, const Tensor& input, const Tensor& target,
                   const Optional& weight, const Tensor& coefficients, c10::string_view transform, Constants constants,
                   const Tensor& row_stats, int64_t ignore_index, double label_smoothing, double z_loss,
                   Tensor* grad_input, bool need_coefficients) {
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
  const Shares shares(rows, input.size(1));
  CoefficientSums sums(arguments, shares, need_coefficients);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const CrossEntropyBackwardCall<S> call{rows_of(input),
                                           options.target.const_data_ptr<int64_t>(),
                                           arguments.view<S>(),
                                           options.view<S>(),
                                           S(0),
                                           upstream[0].defined() ? upstream[0].const_data_ptr<S>() : nullptr,
                                           upstream[1].defined() ? upstream[1].const_data_ptr<S>() : nullptr,
                                           const_stats_of<S>(stats),
                                           rows_or_none(grad_input, input)};
    for_each_block(shares, rows, input.size(1), [&](auto share, auto begin, auto end, auto first, auto last) {
      kernels.cross_entropy_backward(call, sums.share(share), begin, end, first, last);
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
  Tensor grad_input = need_input ? empty_gradient(input) : at::empty({0}, input.options());
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_statistics(const Tensor& input, const Tensor& target,
                                                                    const Tensor& coefficients,
                                                                    c10::string_view transform, Constants constants,
                                                                    int64_t ignore_index) {
  check_rows("input", input);
  const TransformArguments arguments(input, coefficients, transform, constants);
  const LossArguments options(input, target, {}, ignore_index, 0, 0);
  const int64_t rows = input.size(0);
  const auto type = input.options().dtype(arithmetic_type(input));
  const auto count = input.options().dtype(at::kLong);
  Tensor log_prob = at::empty({rows}, type), entropy = at::empty({rows}, type), lse = at::empty({rows}, type);
  Tensor argmax = at::empty({rows}, count), rank = at::empty({rows}, count);
  with_kernels(input, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const TokenStatisticsCall<S> call{rows_of(input),
                                      options.target.const_data_ptr<int64_t>(),
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
  m.impl("cross_entropy_.cpu", &cross_entropy_);
  m.impl("cross_entropy_backward_.cpu", &cross_entropy_backward_);
  m.impl("token_statistics.cpu", &token_statistics);
  m.impl("log_softmax.cpu", &log_softmax);
  m.impl("log_softmax_backward.cpu", &log_softmax_backward);
}

}  // namespace monosoftmax::cpu
