// The row algorithm: blockwise log-sum-exp, and the loss of a row with its gradient.
#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "row/loss.h"
#include "row/online_softmax.h"
#include "row/probability_loss.h"

namespace monosoftmax::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

OnlineSoftmax<double> in_blocks(const std::vector<double>& y, size_t block) {
  OnlineSoftmax<double> state;
  for (size_t begin = 0; begin < y.size(); begin += block) {
    const size_t end = std::min(y.size(), begin + block);
    double largest = -kInfinity;
    for (size_t i = begin; i < end; ++i) largest = std::max(largest, y[i]);
    const double shift = state.shift(largest);
    double sum = 0;
    for (size_t i = begin; i < end; ++i) sum += std::exp(y[i] - shift);
    state.add(sum);
  }
  return state;
}

void test_log_sum_exp() {
  const std::vector<double> y = {-3, 700, 1, 699.5, -kInfinity, 650, 701, -800};
  double sum = 0;
  for (const double value : y) sum += std::exp(value - 701);
  for (size_t block = 1; block <= y.size(); ++block) {
    const auto state = in_blocks(y, block);
    CHECK(state.largest() == 701);
    CHECK_CLOSE(state.sum(), sum, 1e-14);
    CHECK_CLOSE(state.lse(), 701 + std::log(sum), 1e-14);
  }
  for (size_t block = 1; block <= 3; ++block) {
    CHECK_CLOSE(in_blocks({-kInfinity, -kInfinity, -2}, block).lse(), -2, 1e-15);
    CHECK(in_blocks({-kInfinity, -kInfinity, -kInfinity}, block).lse() == -kInfinity);
    CHECK(std::isnan(in_blocks({-kInfinity, -kInfinity, -kInfinity}, block).log_sum()));
    CHECK(std::isnan(in_blocks({0, kNaN, 5}, block).lse()));
    CHECK(std::isnan(in_blocks({0, kInfinity, 5}, block).log_sum()));
  }
}

// A row in two parts: as one, whatever is in them.
void test_merge() {
  const std::vector<std::vector<double>> rows = {{-3, 700, 1, 699.5, -kInfinity, 650, 701, -800},
                                                 {-kInfinity, -kInfinity, -2, 5},
                                                 {-kInfinity, -kInfinity, -kInfinity},
                                                 {0, kNaN, 5, 1},
                                                 {0, 2, kInfinity, 5}};
  for (const auto& y : rows) {
    const auto whole = in_blocks(y, y.size());
    for (size_t cut = 0; cut <= y.size(); ++cut) {
      auto first = in_blocks({y.begin(), y.begin() + static_cast<int64_t>(cut)}, 2);
      first.merge(in_blocks({y.begin() + static_cast<int64_t>(cut), y.end()}, 3));
      CHECK(std::isnan(first.log_sum()) == std::isnan(whole.log_sum()));
      if (std::isnan(whole.log_sum())) continue;
      CHECK(first.largest() == whole.largest());
      CHECK_CLOSE(first.lse(), whole.lse(), 1e-14);
    }
  }
}

struct Row {
  std::vector<double> y;
  LossOptions<double> options;
  int64_t target;

  double loss() const {
    const auto state = in_blocks(y, 2);
    double gaps = 0;
    for (size_t j = 0; j < y.size(); ++j) gaps += options.weight_of(static_cast<int64_t>(j)) * (y[j] - state.largest());
    return RowLoss<double>(options, target)
        .loss(y[static_cast<size_t>(target)] - state.largest(), gaps, state.log_sum(), state.lse());
  }
};

void test_loss() {
  const std::vector<double> y = {0.3, -1.2, 2.5, 0.9, -0.4};
  const std::vector<double> weight = {0.5, 2, 1.5, 0, 1};
  for (const double smoothing : {0.0, 0.1, 1.0}) {
    for (const double z_loss : {0.0, 0.03}) {
      for (const double* w : {static_cast<const double*>(nullptr), weight.data()}) {
        Row row{y, {5, -100, smoothing, z_loss, w, 5.0}, 1};
        const auto state = in_blocks(y, 5);
        double wanted = z_loss * state.lse() * state.lse();
        for (int64_t j = 0; j < 5; ++j) {
          const double q =
              (j == 1 ? (1 - smoothing) * row.options.weight_of(1) : 0) + smoothing / 5 * row.options.weight_of(j);
          wanted += q * (state.lse() - y[static_cast<size_t>(j)]);
        }
        CHECK_CLOSE(row.loss(), wanted, 1e-14);

        const double grad_loss = 0.7, grad_lse = -0.2, step = 1e-6;
        const auto g = RowLoss<double>(row.options, 1).gradient(grad_loss, grad_lse, state.largest(), state.sum());
        for (size_t j = 0; j < 5; ++j) {
          Row above = row, below = row;
          above.y[j] += step;
          below.y[j] -= step;
          const double difference = (grad_loss * (above.loss() - below.loss()) +
                                     grad_lse * (in_blocks(above.y, 5).lse() - in_blocks(below.y, 5).lse())) /
                                    (2 * step);
          const double p = std::exp(y[j] - state.lse());
          const double got = g.of_p * p -
                             (g.of_target * (j == 1) + g.of_weight * row.options.weight_of(static_cast<int64_t>(j))) +
                             g.extra_of_p * p;
          CHECK_CLOSE(got, difference, 1e-8);
        }
      }
    }
  }
}

// A row of class probabilities, whose loss may be known in two parts.
struct SoftRow {
  std::vector<double> y, target;
  ProbabilityOptions<double> options;

  double q(size_t j) const {
    const double weight = options.weight == nullptr ? 1 : options.weight[j];
    return (options.kept() * target[j] + options.spread()) * weight;
  }
  ProbabilityPart<double> part(size_t first, size_t last, size_t block) const {
    ProbabilityPart<double> part;
    for (size_t begin = first; begin < last; begin += block) {
      const size_t end = std::min(last, begin + block);
      double largest = -kInfinity;
      for (size_t i = begin; i < end; ++i) largest = std::max(largest, y[i]);
      const double shift = part.shift(largest);
      double sum = 0, mass = 0, gaps = 0;
      for (size_t i = begin; i < end; ++i) {
        sum += std::exp(y[i] - shift);
        mass += q(i);
        if (q(i) != 0) gaps += q(i) * (y[i] - shift);
      }
      part.add(sum, mass, gaps);
    }
    return part;
  }
  double loss() const { return part(0, y.size(), y.size()).loss(options); }
};

void test_soft_loss() {
  const std::vector<double> weight = {0.5, 2, 1.5, 0, 1};
  for (const double smoothing : {0.0, 0.1, 1.0}) {
    for (const double z_loss : {0.0, 0.03}) {
      for (const double* w : {static_cast<const double*>(nullptr), weight.data()}) {
        const SoftRow row{{0.3, -1.2, 2.5, 0.9, -0.4}, {0.2, 0, 0.1, 0.9, 0}, {5, smoothing, z_loss, w}};
        const auto state = in_blocks(row.y, 5);
        double wanted = z_loss * state.lse() * state.lse(), mass = 0;
        for (size_t j = 0; j < 5; ++j) {
          wanted += row.q(j) * (state.lse() - row.y[j]);
          mass += row.q(j);
        }
        for (size_t block = 1; block <= 5; ++block) {
          for (size_t cut = 0; cut <= 5; ++cut) {
            auto whole = row.part(0, cut, block);
            whole.merge(row.part(cut, 5, block));
            CHECK_CLOSE(whole.loss(row.options), wanted, 1e-14);
            CHECK_CLOSE(whole.mass(), mass, 1e-14);
          }
        }

        const double grad_loss = 0.7, grad_lse = -0.2, step = 1e-6;
        const ProbabilityGradient<double> g(row.options, mass, grad_loss, grad_lse, state.largest(), state.sum());
        for (size_t j = 0; j < 5; ++j) {
          SoftRow above = row, below = row;
          above.y[j] += step;
          below.y[j] -= step;
          const double difference = (grad_loss * (above.loss() - below.loss()) +
                                     grad_lse * (in_blocks(above.y, 5).lse() - in_blocks(below.y, 5).lse())) /
                                    (2 * step);
          const double p = std::exp(row.y[j] - state.lse());
          CHECK_CLOSE(g.of_p * p - grad_loss * row.q(j) + g.extra_of_p * p, difference, 1e-8);
        }
      }
    }
  }
}

// Logits of -inf, in whatever part of the row.
void test_soft_loss_of_masked_logits() {
  SoftRow row{{-kInfinity, -kInfinity, 700, 3, -kInfinity, 702}, {0, 0, 0.3, 0, 0, 0.7}, {6, 0, 0, nullptr}};
  const double wanted = 0.3 * (in_blocks(row.y, 6).lse() - 700) + 0.7 * (in_blocks(row.y, 6).lse() - 702);
  for (size_t block = 1; block <= 6; ++block) {
    for (size_t cut = 0; cut <= 6; ++cut) {
      auto whole = row.part(0, cut, block);
      whole.merge(row.part(cut, 6, block));
      CHECK_CLOSE(whole.loss(row.options), wanted, 1e-13);
    }
  }
  row.target[1] = 0.1;
  CHECK(row.part(0, 6, 1).loss(row.options) == kInfinity);
  row.y.assign(6, -kInfinity);
  CHECK(std::isnan(row.loss()));
  row.target.assign(6, 0);
  CHECK(std::isnan(row.loss()));
}

}  // namespace
}  // namespace monosoftmax::test

int main() {
  using namespace monosoftmax::test;
  test_log_sum_exp();
  test_merge();
  test_loss();
  test_soft_loss();
  test_soft_loss_of_masked_logits();
  return failures == 0 ? 0 : 1;
}
