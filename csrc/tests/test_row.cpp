// The row algorithm: blockwise log-sum-exp, the losses of a row with their gradients, and the divergences.
#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "row/divergence.h"
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

// The sums of a divergence of softmax(y) from exp(log_q), and dL/dy.
template <template <class> class Divergence>
double divergence(const std::vector<double>& y, const std::vector<double>& log_q, double beta,
                  std::vector<double>* gradient = nullptr) {
  const double lse = in_blocks(y, y.size()).lse();
  const Divergence<double> divergence(beta);
  const auto terms = [&](size_t j) {
    return divergence.of(y[j] - lse, std::exp(y[j] - lse), log_q[j], std::exp(log_q[j]));
  };
  double loss = 0, sum = 0;
  for (size_t j = 0; j < y.size(); ++j) {
    loss += terms(j).loss;
    sum += terms(j).gradient;
  }
  if (gradient == nullptr) return loss;
  gradient->clear();
  for (size_t j = 0; j < y.size(); ++j) gradient->push_back(terms(j).gradient - std::exp(y[j] - lse) * sum);
  return loss;
}

template <template <class> class Divergence, class Wanted>
void test_divergence(double beta, Wanted&& wanted) {
  const std::vector<double> y = {0.3, -1.2, 2.5, 0.9, -0.4}, log_q = {-1.5, -0.2, -7, -40, -2};
  const double lse = in_blocks(y, 5).lse();
  double sum = 0;
  for (size_t j = 0; j < 5; ++j) sum += wanted(std::exp(y[j] - lse), std::exp(log_q[j]));
  std::vector<double> gradient;
  CHECK_CLOSE(divergence<Divergence>(y, log_q, beta, &gradient), sum, 1e-14);
  const double step = 1e-6;
  for (size_t j = 0; j < 5; ++j) {
    std::vector<double> above = y, below = y;
    above[j] += step;
    below[j] -= step;
    CHECK_CLOSE(gradient[j],
                (divergence<Divergence>(above, log_q, beta) - divergence<Divergence>(below, log_q, beta)) / (2 * step),
                1e-8);
  }
  // p and q are the same; far from 0, too.
  std::vector<double> log_p, far;
  for (const double each : y) log_p.push_back(each - lse);
  for (const double each : y) far.push_back(each - 300);
  CHECK_CLOSE(divergence<Divergence>(y, log_p, beta, &gradient), 0, 1e-14);
  for (const double each : gradient) CHECK_CLOSE(each, 0, 1e-14);
  CHECK_CLOSE(divergence<Divergence>(far, log_p, beta), 0, 1e-12);
  // Classes of which neither has anything.
  std::vector<double> masked_y = y, masked_q = log_q;
  masked_y.insert(masked_y.end(), {-kInfinity, -kInfinity, -1000});
  masked_q.insert(masked_q.end(), {-kInfinity, -1000, -kInfinity});
  CHECK_CLOSE(divergence<Divergence>(masked_y, masked_q, beta, &gradient), sum, 1e-14);
  for (size_t j = 5; j < 8; ++j) CHECK(gradient[j] == 0);
  masked_q[7] = kNaN;
  CHECK(std::isnan(divergence<Divergence>(masked_y, masked_q, beta)) || beta == 0);
}

void test_divergences() {
  test_divergence<ForwardKl>(0.5, [](double p, double q) { return q * std::log(q / p); });
  // beta 0: a NaN where p is 0 is not read.
  test_divergence<ReverseKl>(0, [](double p, double q) { return p * std::log(p / q); });
  for (const double beta : {0.5, 0.1, 0.999}) {
    test_divergence<Jsd>(beta, [beta](double p, double q) {
      const double m = beta * q + (1 - beta) * p;
      return beta * q * std::log(q / m) + (1 - beta) * p * std::log(p / m);
    });
  }
  const std::vector<double> y = {0, 0}, log_q = {0, -kInfinity}, y_of_one = {0, -kInfinity}, log_half = {-1, -1};
  CHECK(divergence<ReverseKl>(y, log_q, 0.5) == kInfinity);
  CHECK(divergence<ForwardKl>(y_of_one, log_half, 0.5) == kInfinity);
  CHECK_CLOSE(divergence<Jsd>(y, log_q, 0.5), 0.5 * (std::log(4. / 3) + 0.5 * std::log(2. / 3) + 0.5 * std::log(2)),
              1e-14);
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
  test_divergences();
  return failures == 0 ? 0 : 1;
}
