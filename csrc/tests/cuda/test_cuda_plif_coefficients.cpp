// The coefficients of a PLIF and the gradient of its raw slopes on the CPU, against the sums in double, piece by piece:
// of every number of warps, in every order of the threads, under each sanitizer.
#include <cmath>
#include <memory>
#include <vector>

#include "../check.h"
#include "cuda/launch.h"
#include "orders.h"
#include "rows.h"

namespace monosoftmax::cuda::test {
namespace {

constexpr double kMinSlope = 0.1;

// A slope, and its derivative by the raw one.
struct Slope {
  double value, derivative;

  explicit Slope(double raw) {
    const double unclamped = kMinSlope + (1 - kMinSlope) * (raw > 20 ? raw : std::log1p(std::exp(raw)));
    value = std::fmin(unclamped, kMostSlope);
    derivative = unclamped > kMostSlope ? 0 : (1 - kMinSlope) / (1 + std::exp(-raw));
  }
};

// d value_k / d slope_j: what of piece j lies between 0 and the left end of piece k, to the left with a minus.
double rise_of(const PlifGrid& grid, int64_t k, int64_t j) {
  if (k > grid.centre) return (j == grid.centre ? -grid.inside : 0) + (grid.centre <= j && j < k ? grid.width : 0);
  return (j == grid.centre ? -grid.inside : 0) - (k <= j && j < grid.centre ? grid.width : 0);
}

void run(int64_t pieces, double bound) {
  Numbers numbers(static_cast<int>(pieces));
  const PlifGrid grid = plif_grid(pieces, bound);
  // Of exactly as many numbers, so that the address sanitizer sees where they end.
  const std::unique_ptr<float[]> raw(new float[pieces]), table(new float[2 * pieces]), upstream(new float[2 * pieces]),
      gradient(new float[pieces]);
  for (int64_t k = 0; k < pieces; ++k) raw[k] = k % 11 == 5 ? 20000 : static_cast<float>(2 * numbers());
  for (int64_t i = 0; i < 2 * pieces; ++i) upstream[i] = static_cast<float>(numbers());
  PlifArguments arguments{
      grid, static_cast<float>(kMinSlope), static_cast<float>(1 - kMinSlope), raw.get(), table.get(), nullptr, nullptr};
  launch_plif_coefficients(arguments, nullptr);
  arguments.grad_coefficients = upstream.get();
  arguments.grad_raw_slope = gradient.get();
  launch_plif_coefficients_backward(arguments, nullptr);
  std::vector<Slope> slopes;
  for (int64_t k = 0; k < pieces; ++k) slopes.emplace_back(raw[k]);
  for (int64_t k = 0; k < pieces; ++k) {
    // Parts of the piece in which 0 lies may cancel.
    double value = 0, size = grid.width * slopes[grid.centre].value;
    double of_slope = upstream[k], size_of_gradient = std::fabs(of_slope);
    for (int64_t j = 0; j < pieces; ++j) {
      const double part = rise_of(grid, k, j) * slopes[j].value, back = rise_of(grid, j, k) * upstream[pieces + j];
      value += part;
      size += std::fabs(part);
      of_slope += back;
      size_of_gradient += std::fabs(back);
    }
    CHECK(std::fabs(table[k] - slopes[k].value) <= 5e-7 * slopes[k].value);
    CHECK(std::fabs(table[pieces + k] - value) <= 5e-7 * size);
    CHECK(std::fabs(gradient[k] - of_slope * slopes[k].derivative) <= 1e-6 * size_of_gradient);
  }
}

void test_every_size() {
  // Of one warp, of a few, of all, and of more pieces than threads.
  for (const int64_t pieces : {1, 2, 3, 31, 32, 33, 50, 100, 1024, 2100}) {
    run(pieces, 20);
    run(pieces, 1.7);
  }
}

}  // namespace
}  // namespace monosoftmax::cuda::test

int main() {
  monosoftmax::test::in_every_order(monosoftmax::cuda::test::test_every_size);
  return monosoftmax::test::failures == 0 ? 0 : 1;
}
