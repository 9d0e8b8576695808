// log_softmax, its gradients and token_statistics on the CPU, against the formulas in double: every transform, in every
// order of the threads, under each sanitizer.
#include <cmath>
#include <limits>
#include <vector>

#include "../check.h"
#include "orders.h"
#include "rows.h"

namespace monosoftmax::cuda::test {
namespace {

const Device kDevice{90, 2, 227 << 10, 228 << 10};

struct Truth {
  std::vector<double> log_p, gradient, coefficients, entropy, lse;
  double size = 0;  // of the contributions to the coefficients
};

template <class F>
void fill(const F& f, const Case& c, const std::vector<float>& logits, const std::vector<float>& upstream, int classes,
          Truth& truth) {
  truth.coefficients.resize(c.coefficients.size());
  for (size_t begin = 0; begin < logits.size(); begin += classes) {
    const float* z = &logits[begin];
    double largest = -std::numeric_limits<double>::infinity(), sum = 0, entropy = 0, total = 0;
    for (int j = 0; j < classes; ++j) largest = std::fmax(largest, f.value(z[j]));
    for (int j = 0; j < classes; ++j) sum += std::exp(f.value(z[j]) - largest);
    for (int j = 0; j < classes; ++j) total += upstream[begin + j];
    const double lse = largest + std::log(sum);
    for (int j = 0; j < classes; ++j) {
      const auto point = f.at(z[j]);
      const double log_p = point.value - lse, dy = upstream[begin + j] - std::exp(log_p) * total;
      entropy -= std::exp(log_p) * log_p;
      truth.log_p.push_back(log_p);
      truth.gradient.push_back(dy * point.derivative);
      add_to_coefficients(c, f, point, z[j], dy, truth.coefficients);
      truth.size += std::fabs(dy) * (1 + std::fabs(z[j]));
    }
    truth.entropy.push_back(entropy);
    truth.lse.push_back(lse);
  }
}

// Logits of type E; log p and its upstream gradient of type Other, which begins elsewhere.
template <class E, class Other>
void run(const Case& c, int rows, int classes, int offset, int other_offset) {
  E* const kind = nullptr;
  Other* const other_kind = nullptr;
  Numbers numbers(classes);
  Buffer<E> input(rows * classes, offset), gradient(rows * classes, offset);
  Buffer<Other> output(rows * classes, other_offset), upstream(rows * classes, other_offset);
  std::vector<float> z, g;
  for (int i = 0; i < rows * classes; ++i) {
    input.get()[i] = narrow(6 * numbers(), kind);
    upstream.get()[i] = narrow(numbers(), other_kind);
    z.push_back(widen(input.get()[i]));
    g.push_back(widen(upstream.get()[i]));
  }
  Truth truth;
  const std::vector<double> data = coefficients_of(c);
  CHECK(with_transform<double>(c.transform, {data.data(), c.size(), c.constants.data()},
                               [&](const auto& f) { fill(f, c, z, g, classes, truth); }));
  std::vector<float> stats(2 * rows);
  PlanRequest request{};
  request.transform = c.transform;
  request.size = c.size();
  request.rows = rows;
  request.classes = classes;
  request.element_bytes = sizeof(E);
  const Plan plan = make_plan(request, kDevice);
  launch_log_softmax(plan, c.transform, type_of(kind),
                     {input.get(), classes, rows, classes, arguments_of(c), output.get(), type_of(other_kind), classes,
                      stats.data(), stats.data() + rows},
                     nullptr);
  for (int i = 0; i < rows * classes; ++i) {
    const double error = std::fabs(widen(output.get()[i]) - truth.log_p[i]);
    CHECK(error <= 4e-6 + (rounding_of(other_kind) + 1e-6) * std::fabs(truth.log_p[i]));
  }

  request.gradient = true;
  request.coefficients = !c.coefficients.empty();
  const Plan backward = make_plan(request, kDevice);
  std::vector<float> partials(backward.sum_sets * c.coefficients.size() + 1);
  LogSoftmaxBackwardArguments a{};
  a.grad_output = upstream.get();
  a.grad_output_type = type_of(other_kind);
  a.input = input.get();
  a.grad_input = gradient.get();
  a.stride = a.grad_stride = a.grad_output_stride = a.classes = classes;
  a.rows = rows;
  a.transform = arguments_of(c);
  a.largest = stats.data();
  a.sum = stats.data() + rows;
  a.sums.partials = partials.data();
  launch_log_softmax_backward(backward, c.transform, type_of(kind), a, nullptr);
  for (int i = 0; i < rows * classes; ++i) {
    const double error = std::fabs(widen(gradient.get()[i]) - truth.gradient[i]);
    CHECK(error <= 2e-5 + rounding_of(kind) * std::fabs(truth.gradient[i]));
  }
  for (size_t i = 0; i < c.coefficients.size(); ++i) {
    double total = 0;
    for (int64_t set = 0; set < backward.sum_sets; ++set) total += partials[set * c.coefficients.size() + i];
    CHECK(std::fabs(total - truth.coefficients[i]) <= 2e-6 * (truth.size + 1));
  }

  std::vector<int64_t> target(rows), argmax(rows), rank(rows);
  for (int row = 0; row < rows; ++row) target[row] = row == 1 ? -100 : (row * 11) % classes;
  std::vector<float> log_prob(rows), entropy(rows), lse(rows), row_stats(3 * rows);
  launch_token_statistics(plan, c.transform, type_of(kind),
                          {input.get(), classes, rows, classes, target.data(), arguments_of(c), -100, log_prob.data(),
                           entropy.data(), lse.data(), argmax.data(), rank.data(), row_stats.data()},
                          nullptr);
  for (int row = 0; row < rows; ++row) {
    const float* logits = &z[row * classes];
    int best = 0, larger = 0;
    for (int j = 0; j < classes; ++j) {
      if (logits[j] > logits[best]) best = j;
      if (row != 1) larger += logits[j] > logits[target[row]];
    }
    CHECK(argmax[row] == best && rank[row] == (row == 1 ? -1 : larger));
    CHECK_CLOSE(log_prob[row], row == 1 ? 0 : truth.log_p[row * classes + target[row]], 3e-6);
    CHECK_CLOSE(entropy[row], truth.entropy[row], 3e-6);
    CHECK_CLOSE(lse[row], truth.lse[row], 1e-6);
  }
}

void test_everything() {
  for (const Case& c : kCases) {
    run<float, __nv_bfloat16>(c, 3, 1100, 0, 3);
    run<__nv_bfloat16, float>(c, 2, 523, 5, 1);
    run<__half, __half>(c, 5, 33, 1, 1);
    run<float, float>(c, 1, 1, 0, 0);
  }
}

}  // namespace
}  // namespace monosoftmax::cuda::test

int main() {
  monosoftmax::test::in_every_order(monosoftmax::cuda::test::test_everything);
  return monosoftmax::test::failures == 0 ? 0 : 1;
}
