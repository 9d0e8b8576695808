// The loss kernels on the CPU, against the formulas in double: every transform, type, option and way of keeping a row,
// rows of any alignment, in every order of the threads. Buffers end where the rows do, for the address sanitizer; the
// thread sanitizer finds the races.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "orders.h"
#include "rows.h"

namespace monosoftmax::cuda::test {
namespace {

struct Options {
  const char* name;
  float label_smoothing, z_loss;
  bool weighted, from_stats;  // from_stats: gradients of losses and lse, after the losses
};

constexpr Options kOptions[] = {
    {"plain", 0, 0, false, false},       {"smoothed", 0.1f, 0.01f, false, false},
    {"weighted", 0, 0, true, false},     {"weighted and smoothed", 0.2f, 0, true, false},
    {"of lse", 0.1f, 0.01f, true, true},
};

struct Way {
  const char* name;
  Tuning tuning;
};

constexpr Way kWays[] = {{"block", {}}, {"cluster", {true, 4}}, {"reread", {false}}};

constexpr int64_t kIgnored = -100;

// What the kernels are to compute, in double.
struct Truth {
  std::vector<double> loss, lse, gradient, coefficients;
  double size = 0;  // of the contributions to the coefficients
};

class Problem {
 public:
  Problem(const Case& c, const Options& options, int rows, int classes)
      : c_(c), options_(options), rows_(rows), classes_(classes), z(rows * classes), weight(classes), target(rows) {
    Numbers numbers(rows * 31 + classes);
    for (float& each : z) each = 6 * numbers();
    for (float& each : weight) each = 1.5f + numbers();
    for (int row = 0; row < rows; ++row) target[row] = (row * 7 + classes - 1) % classes;
    if (rows > 2) target[2] = kIgnored;
    for (int row = 0; row < rows; ++row) grad_loss.push_back(options.from_stats ? 1 + numbers() : 0.7f);
    for (int row = 0; row < rows; ++row) grad_lse.push_back(options.from_stats ? numbers() : 0);
  }

  Truth truth() const {
    const std::vector<double> data = coefficients_of(c_);
    Truth result;
    result.gradient.resize(z.size());
    result.coefficients.resize(c_.coefficients.size());
    const bool known = with_transform<double>(c_.transform, {data.data(), c_.size(), c_.constants.data()},
                                              [&](const auto& f) { fill(f, result); });
    CHECK(known);
    return result;
  }

  const Case& c_;
  const Options& options_;
  int rows_, classes_;
  std::vector<float> z, weight;
  std::vector<int64_t> target;
  std::vector<float> grad_loss, grad_lse;

 private:
  double weight_of(int64_t column) const { return options_.weighted ? weight[column] : 1; }

  template <class F>
  void fill(const F& f, Truth& result) const {
    double weights = 0;
    for (int j = 0; j < classes_; ++j) weights += weight_of(j);
    for (int row = 0; row < rows_; ++row) {
      const float* logits = &z[row * classes_];
      double largest = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int j = 0; j < classes_; ++j) largest = std::fmax(largest, f.value(logits[j]));
      for (int j = 0; j < classes_; ++j) sum += std::exp(f.value(logits[j]) - largest);
      const double lse = largest + std::log(sum), smooth = static_cast<double>(options_.label_smoothing) / classes_;
      const bool ignored = target[row] == kIgnored;
      double loss = options_.z_loss * lse * lse;
      for (int j = 0; j < classes_; ++j) {
        const double mass = mass_of(row, j, smooth), p = std::exp(f.value(logits[j]) - lse);
        loss += mass * (lse - f.value(logits[j]));
        const double g = ignored ? 0 : grad_loss[row];
        const double total = ignored ? 0 : (1 - options_.label_smoothing) * weight_of(target[row]) + smooth * weights;
        const double dy = g * (total * p - mass) + (2 * options_.z_loss * lse * g + grad_lse[row]) * p;
        const auto point = f.at(logits[j]);
        result.gradient[row * classes_ + j] = dy * point.derivative;
        add_to_coefficients(c_, f, point, logits[j], dy, result.coefficients);
        result.size += std::fabs(dy) * (1 + std::fabs(logits[j]));
      }
      result.loss.push_back(ignored ? 0 : loss);
      result.lse.push_back(lse);
    }
  }
  double mass_of(int row, int column, double smooth) const {
    if (target[row] == kIgnored) return 0;
    const double of_target = column == target[row] ? (1 - options_.label_smoothing) * weight_of(column) : 0;
    return of_target + smooth * weight_of(column);
  }
};

template <class E>
void run(const Problem& problem, const Way& way, int offset, int output_offset, bool in_place) {
  const Case& c = problem.c_;
  const int rows = problem.rows_, classes = problem.classes_;
  E* const kind = nullptr;
  // Logits that E can hold: the truth is of these.
  Problem rounded = problem;
  Buffer<E> input(rows * classes, offset), output(rows * classes, output_offset);
  for (size_t i = 0; i < problem.z.size(); ++i) {
    input.get()[i] = narrow(problem.z[i], kind);
    rounded.z[i] = widen(input.get()[i]);
  }
  const Truth truth = rounded.truth();
  const Device device{90, 2, 227 << 10, 228 << 10, way.tuning};
  const bool sums = !c.coefficients.empty();
  std::vector<float> loss(rows), lse(rows), stats(2 * rows);
  float weight_sum = 0;
  for (float each : problem.weight) weight_sum += each;

  CrossEntropyArguments a{};
  a.input = input.get();
  a.stride = a.grad_stride = classes;
  a.rows = rows;
  a.classes = classes;
  a.target = problem.target.data();
  a.transform = arguments_of(c);
  a.ignore_index = kIgnored;
  a.label_smoothing = problem.options_.label_smoothing;
  a.z_loss = problem.options_.z_loss;
  a.weight = problem.options_.weighted ? problem.weight.data() : nullptr;
  a.weight_sum = problem.options_.weighted ? &weight_sum : nullptr;
  a.loss = loss.data();
  a.lse = lse.data();
  a.largest = stats.data();
  a.sum = stats.data() + rows;
  PlanRequest request{c.transform, c.size(),  rows,
                      classes,     sizeof(E), true,
                      false,       sums,      problem.options_.weighted && problem.options_.label_smoothing > 0,
                      true};
  a.losses = a.return_lse = true;
  if (problem.options_.from_stats) {
    launch_cross_entropy(make_plan(request, device), c.transform, type_of(kind), a, nullptr);
    a.losses = request.losses = false;
    a.grad_lse = problem.grad_lse.data();
  }
  request.gradient = true;
  const Plan plan = make_plan(request, device);
  std::vector<float> partials(plan.sum_sets * std::max<size_t>(c.coefficients.size(), 1));
  a.sums.partials = partials.data();
  a.grad_loss = problem.grad_loss.data();
  a.grad_loss_stride = 1;
  E* const gradient = in_place ? input.get() : output.get();
  a.grad_input = gradient;
  launch_cross_entropy(plan, c.transform, type_of(kind), a, nullptr);

  for (int row = 0; row < rows; ++row) {
    CHECK_CLOSE(loss[row], truth.loss[row], 3e-6);
    CHECK_CLOSE(lse[row], truth.lse[row], 1e-6);
  }
  for (int i = 0; i < rows * classes; ++i) {
    const double got = widen(gradient[i]), wanted = truth.gradient[i];
    CHECK(std::fabs(got - wanted) <= 4e-6 + rounding_of(kind) * std::fabs(wanted));
  }
  for (size_t i = 0; i < c.coefficients.size(); ++i) {
    double total = 0;
    for (int64_t set = 0; set < plan.sum_sets; ++set) total += partials[set * c.coefficients.size() + i];
    CHECK(std::fabs(total - truth.coefficients[i]) <= 2e-6 * (truth.size + 1));
  }
}

void test_scale() {
  for (const int64_t count : {0, 1, 3, 5000}) {
    for (const float factor : {1.0f, -2.0f}) {
      Buffer<__nv_bfloat16> x(count, 3);
      for (int64_t i = 0; i < count; ++i) x.get()[i] = __float2bfloat16_rn(static_cast<float>(i % 100));
      launch_scale(x.get(), ElementType::kBFloat16, count, &factor, 1, nullptr);
      for (int64_t i = 0; i < count; ++i) CHECK(widen(x.get()[i]) == factor * static_cast<float>(i % 100));
    }
  }
}

// A table of each warp in memory, and one for all.
void test_large_tables() {
  Case c{"plif", std::vector<float>(2 * 4000), {-8, 16.0 / 4000, 4000 / 16.0}, 2};
  for (int k = 0; k < 4000; ++k) {
    c.coefficients[k] = 1;
    c.coefficients[4000 + k] = static_cast<float>(-8 + k * 16.0 / 4000);
  }
  Problem problem(c, kOptions[0], 3, 700);
  // Many lanes of a warp in one piece.
  for (float& each : problem.z) each = std::round(each);
  std::vector<float> loss(3), lse(3), stats(6), gradient(3 * 700), table(table_numbers(c.transform, c.size()));
  CrossEntropyArguments a{};
  a.input = problem.z.data();
  a.stride = a.grad_stride = a.classes = 700;
  a.rows = 3;
  a.target = problem.target.data();
  a.transform = {c.coefficients.data(), c.size(), {-8, 16.0 / 4000, 4000 / 16.0}, table.data()};
  a.ignore_index = kIgnored;
  a.losses = true;
  a.loss = loss.data();
  a.lse = lse.data();
  a.largest = stats.data();
  a.sum = stats.data() + 3;
  a.grad_loss = problem.grad_loss.data();
  a.grad_loss_stride = 1;
  a.grad_input = gradient.data();
  launch_fill_table(c.transform, a.transform, table.data(), nullptr);
  const Truth truth = problem.truth();
  for (const bool atomic : {false, true}) {
    const PlanRequest request{c.transform, c.size(), 3, 700, 4, true, true, true, false, !atomic};
    Plan plan = make_plan(request, {90, 2, 227 << 10, 228 << 10});
    CHECK(plan.sums == SumsKind::kWarps && !plan.table_in_shared_memory);
    if (atomic) {
      plan.atomic = true;
      plan.sum_sets = 1;
    }
    std::vector<float> partials(plan.sum_sets * c.coefficients.size());
    std::vector<double> of_all(c.coefficients.size());
    a.sums = {atomic ? nullptr : partials.data(), atomic ? of_all.data() : nullptr};
    launch_cross_entropy(plan, c.transform, ElementType::kFloat, a, nullptr);
    for (size_t i = 0; i < c.coefficients.size(); ++i) {
      double total = of_all[i];
      for (int64_t set = 0; set < plan.sum_sets; ++set) total += partials[set * c.coefficients.size() + i];
      CHECK(std::fabs(total - truth.coefficients[i]) <= 2e-6 * (truth.size + 1));
    }
  }
}

void test_everything() {
  for (const Case& c : kCases) {
    for (const Way& way : kWays) {
      for (const Options& options : kOptions) {
        // Of the last one, threads have several chunks each.
        const Problem small(c, options, 3, 33), single(c, options, 1, 1), large(c, options, 5, 523),
            long_rows(c, options, 2, 4403);
        run<float>(long_rows, way, 0, 0, false);
        run<float>(small, way, 3, 0, true);
        run<__nv_bfloat16>(large, way, 5, 0, true);
        run<__half>(large, way, 1, 4, false);
        run<__nv_bfloat16>(single, way, 0, 0, false);
      }
    }
  }
  test_large_tables();
  test_scale();
}

}  // namespace
}  // namespace monosoftmax::cuda::test

int main() {
  monosoftmax::test::in_every_order(monosoftmax::cuda::test::test_everything);
  return monosoftmax::test::failures == 0 ? 0 : 1;
}
