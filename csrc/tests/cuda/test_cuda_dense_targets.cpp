// The kernel for targets of all classes on the CPU, against the formulas in double: every transform and kind of target,
// with what stands before and after f, rows of any alignment, in every order of the threads, under each sanitizer.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../check.h"
#include "orders.h"
#include "rows.h"
#include "transforms/inner.h"

namespace monosoftmax::cuda::test {
namespace {

const Device kDevice{90, 2, 227 << 10, 228 << 10};
constexpr float kScale = 0.5f, kCap = 4, kTemperature = 1.6f, kSmoothing = 0.1f, kZLoss = 0.01f, kBeta = 0.3f;
constexpr int64_t kIgnored = -100;

struct Truth {
  std::vector<double> loss, lse, gradient, coefficients, largest, sum, gap;
  double size = 0;  // of the contributions to the coefficients
};

// Logits, and q or log q of a kind; `index` is the target of kOfIndices.
struct Problem {
  const Case& c;
  DenseLoss kind;
  int rows, classes;
  std::vector<float> z, target, weight, grad_loss, grad_lse, grad_entropy;
  std::vector<int64_t> index;

  bool is_cross_entropy() const { return kind == DenseLoss::kOfIndices || kind == DenseLoss::kOfProbabilities; }
  bool ignored(int row) const { return kind == DenseLoss::kOfIndices && index[row] == kIgnored; }
  double q(int row, int column) const {
    if (!is_cross_entropy()) return std::exp(static_cast<double>(target[row * classes + column]));
    if (ignored(row)) return 0;
    const double t = kind == DenseLoss::kOfIndices ? column == index[row] : target[row * classes + column];
    return ((1 - static_cast<double>(kSmoothing)) * t + static_cast<double>(kSmoothing) / classes) * weight[column];
  }

  template <class F>
  void fill(const F& f, Truth& truth) const {
    const Inner<double> inner(kScale, kCap);
    truth.coefficients.resize(c.coefficients.size());
    for (int row = 0; row < rows; ++row) {
      std::vector<double> y;
      for (int j = 0; j < classes; ++j) y.push_back(f.value(inner.value(z[row * classes + j])) / kTemperature);
      const double largest = *std::max_element(y.begin(), y.end());
      double sum = 0, gap = 0, mass = 0, of_q = 0, of_p = 0;
      for (const double each : y) sum += std::exp(each - largest);
      const double lse = largest + std::log(sum);
      const auto log_of = [&](int j) {  // log p / q or log p / m
        const double p = std::exp(y[j] - lse), by = kind == DenseLoss::kJsd ? static_cast<double>(kBeta) : 1;
        return y[j] - lse - std::log(by * q(row, j) + (1 - by) * p);
      };
      for (int j = 0; j < classes; ++j) {
        const double p = std::exp(y[j] - lse), share = q(row, j);
        gap += p * (largest - y[j]);
        mass += share;
        of_p += p * log_of(j);
        of_q += is_cross_entropy() ? share * (lse - y[j]) : share * (std::log(share) - y[j] + lse);
      }
      truth.largest.push_back(largest);
      truth.sum.push_back(sum);
      truth.gap.push_back(gap);
      truth.lse.push_back(lse);
      double loss = of_q + (is_cross_entropy() ? kZLoss * lse * lse : 0);
      if (kind == DenseLoss::kReverseKl) loss = of_p;
      if (kind == DenseLoss::kJsd) loss = of_jsd(row, y, lse) + (1 - static_cast<double>(kBeta)) * of_p;
      truth.loss.push_back(loss);
      const double g = ignored(row) ? 0 : grad_loss[row];
      for (int j = 0; j < classes; ++j) {
        const double p = std::exp(y[j] - lse);
        double dy = g * (mass * p - q(row, j));
        if (is_cross_entropy()) dy += (2 * kZLoss * lse * g + grad_lse[row]) * p;
        if (kind == DenseLoss::kOfIndices) dy -= grad_entropy[row] * p * (y[j] - largest + gap);
        if (kind == DenseLoss::kReverseKl) dy = g * p * (log_of(j) - of_p);
        if (kind == DenseLoss::kJsd) dy = g * (1 - static_cast<double>(kBeta)) * p * (log_of(j) - of_p);
        const double logit = z[row * classes + j], df = dy / kTemperature;
        const auto before = inner.at(logit);
        const auto point = f.at(before.value);
        truth.gradient.push_back(df * point.derivative * before.derivative);
        add_to_coefficients(c, f, point, before.value, df, truth.coefficients);
        truth.size += std::fabs(df) * (1 + std::fabs(logit));
      }
    }
  }

 private:
  double of_jsd(int row, const std::vector<double>& y, double lse) const {
    const double beta = kBeta;
    double result = 0;
    for (int j = 0; j < classes; ++j) {
      const double share = q(row, j), p = std::exp(y[j] - lse);
      result += beta * share * (std::log(share) - std::log(beta * share + (1 - beta) * p));
    }
    return result;
  }
};

template <class E, class Other>
void run(const Case& c, DenseLoss kind, int rows, int classes, int offset, bool in_place) {
  E* const type = nullptr;
  Other* const other_type = nullptr;
  Numbers numbers(classes);
  Buffer<E> input(rows * classes, offset), output(rows * classes, offset + 1);
  Buffer<Other> target(rows * classes, 3 - offset);
  Problem problem{c, kind, rows, classes, {}, {}, {}, {}, {}, {}, {}};
  for (int i = 0; i < rows * classes; ++i) {
    input.get()[i] = narrow(6 * numbers(), type);
    target.get()[i] = narrow(kind >= DenseLoss::kForwardKl ? 3 * numbers() - 5 : 1 + numbers(), other_type);
    problem.z.push_back(widen(input.get()[i]));
    problem.target.push_back(widen(target.get()[i]));
  }
  for (int j = 0; j < classes; ++j) problem.weight.push_back(1.5f + numbers());
  for (int row = 0; row < rows; ++row) {
    problem.grad_loss.push_back(numbers());
    problem.grad_lse.push_back(numbers());
    problem.grad_entropy.push_back(numbers());
    problem.index.push_back(row == 1 ? kIgnored : row * 5 % classes);
  }
  Truth truth;
  const std::vector<double> data = coefficients_of(c);
  CHECK(with_transform<double>(c.transform, {data.data(), c.size(), c.constants.data()},
                               [&](const auto& f) { problem.fill(f, truth); }));
  std::vector<float> loss(rows), lse(rows), stats(3 * rows);
  float weight_sum = 0;
  for (const float each : problem.weight) weight_sum += each;

  DenseTargetArguments a{};
  a.input = input.get();
  a.stride = a.target_stride = a.grad_stride = a.classes = classes;
  a.rows = rows;
  a.transform = arguments_of(c);
  a.transform.inner = {true, kScale, kCap, kScale / kCap};
  a.transform.temperature = &kTemperature;
  a.kind = kind;
  a.beta = kBeta;
  a.row_stats = stats.data();
  a.grad_loss = problem.grad_loss.data();
  a.grad_loss_stride = 1;
  if (problem.is_cross_entropy()) {
    a.label_smoothing = kSmoothing;
    a.z_loss = kZLoss;
    a.weight = problem.weight.data();
    a.weight_sum = &weight_sum;
    a.grad_lse = problem.grad_lse.data();
  }
  if (kind == DenseLoss::kOfIndices) {
    a.indices = problem.index.data();
    a.ignore_index = kIgnored;
    a.grad_entropy = problem.grad_entropy.data();
    for (int row = 0; row < rows; ++row) {
      stats[row] = static_cast<float>(truth.largest[row]);
      stats[rows + row] = static_cast<float>(truth.sum[row]);
      stats[2 * rows + row] = static_cast<float>(truth.gap[row]);
    }
  } else {
    a.target = target.get();
    a.target_type = type_of(other_type);
    a.losses = true;
    a.loss = loss.data();
    a.lse = lse.data();
  }
  a.gradients = true;
  E* const gradient = in_place ? input.get() : output.get();
  a.grad_input = gradient;
  PlanRequest request{};
  request.transform = c.transform;
  request.size = c.size();
  request.rows = rows;
  request.classes = classes;
  request.element_bytes = sizeof(E);
  request.gradient = true;
  request.coefficients = !c.coefficients.empty();
  const Plan plan = make_plan(request, kDevice);
  std::vector<float> partials(plan.sum_sets * c.coefficients.size() + 1);
  a.sums.partials = partials.data();
  launch_dense_target(plan, c.transform, type_of(type), a, nullptr);

  for (int row = 0; row < rows && kind != DenseLoss::kOfIndices; ++row) {
    CHECK_CLOSE(loss[row], truth.loss[row], 1e-5);
    CHECK_CLOSE(lse[row], truth.lse[row], 2e-6);
  }
  for (int i = 0; i < rows * classes; ++i) {
    const double got = widen(gradient[i]), wanted = truth.gradient[i];
    CHECK(std::fabs(got - wanted) <= 2e-5 + (rounding_of(type) + 1e-5) * std::fabs(wanted));
  }
  for (size_t i = 0; i < c.coefficients.size(); ++i) {
    double total = 0;
    for (int64_t set = 0; set < plan.sum_sets; ++set) total += partials[set * c.coefficients.size() + i];
    CHECK(std::fabs(total - truth.coefficients[i]) <= 4e-6 * (truth.size + 1));
  }
}

void test_everything() {
  for (const Case& c : kCases) {
    for (const DenseLoss kind : {DenseLoss::kOfIndices, DenseLoss::kOfProbabilities, DenseLoss::kForwardKl,
                                 DenseLoss::kReverseKl, DenseLoss::kJsd}) {
      run<float, __nv_bfloat16>(c, kind, 3, 1100, 0, true);
      run<__nv_bfloat16, float>(c, kind, 5, 523, 1, false);
      run<__half, __half>(c, kind, 5, 33, 2, true);
      run<float, float>(c, kind, 1, 1, 3, false);
    }
  }
}

}  // namespace
}  // namespace monosoftmax::cuda::test

int main() {
  monosoftmax::test::in_every_order(monosoftmax::cuda::test::test_everything);
  return monosoftmax::test::failures == 0 ? 0 : 1;
}
