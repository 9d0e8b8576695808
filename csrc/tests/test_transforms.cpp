// Every transform over double: increasing, and derivative and coefficient gradients against finite differences. And
// what stands before a transform.
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "transforms/inner.h"
#include "transforms/registry.h"

namespace monosoftmax::test {
namespace {

struct Case {
  std::string name;
  std::vector<double> coefficients;  // a piece of a table after the other
  std::vector<double> constants;
  int rows;  // of a table; 1 for a vector

  int64_t size() const { return static_cast<int64_t>(coefficients.size()) / rows; }
};

// Calls visitor(f) with the transform of a case.
template <class Visitor>
bool with_case(const Case& c, Visitor&& visitor) {
  std::vector<double> data(c.coefficients);
  if (c.rows > 1) {
    const int stride = table_stride(c.rows);
    data.assign(c.size() * stride, 0);
    for (size_t i = 0; i < c.coefficients.size(); ++i) data[i / c.rows * stride + i % c.rows] = c.coefficients[i];
    complete_table(c.name, data.data(), c.size(), c.constants.data());
  }
  return with_transform<double>(c.name, {data.data(), c.size(), c.constants.data()}, visitor);
}

const std::vector<Case> kCases = {
    {"identity", {}, {}, 1},
    {"temperature", {1.7}, {}, 1},
    // slopes 0.5, 2, 1, 0.25 on [-4, 4] in pieces of width 2, with f(0) = 0
    {"plif", {0.5, -5, 2, -4, 1, 0, 0.25, 2}, {-4, 2, 0.5}, 2},
    {"sigsoftmax", {}, {}, 1},
    {"gss", {2.5, -1.5}, {}, 1},
    {"soft_cap", {3}, {}, 1},
    {"sigmoid_cap", {23, 5, 7.5}, {}, 1},
    {"monotonic_mlp", {0.8, 0.5, 1.5, 0.7, 2, -1, 0.3}, {}, 1},
    // x, width, y, height, d0, d1 of pieces [-3, -1], [-1, 0], [0, 2]
    {"spline", {-3, 2, -2, 0.5, 0.5, 1, -1, 1, -1.5, 1.5, 1, 2, 0, 2, 0, 3, 2, 0.7}, {}, 6},
};

double value_of(const Case& c, double z) {
  double value = 0;
  CHECK(with_case(c, [&](const auto& f) { value = f.value(z); }));
  return value;
}

// d f(z) / d coefficients, as the kernels collect it.
template <class F>
std::vector<double> coefficient_gradient(const Case& c, const F& f, double z) {
  std::vector<double> gradient(c.coefficients.size());
  const auto point = f.at(z);
  if constexpr (F::kTableRows > 0) {
    double out[F::kTableRows];
    f.differentiate(point, z, out);
    for (int r = 0; r < F::kTableRows; ++r) gradient[static_cast<size_t>(point.piece) * F::kTableRows + r] = out[r];
  } else {
    gradient.resize(kMostVectorCoefficients);
    f.accumulate(point, z, 1.0, gradient.data());
    gradient.resize(c.coefficients.size());
  }
  return gradient;
}

void test_derivatives(const Case& c) {
  // No knot of any case is within the step of one of these places.
  for (const double z : {-7.3, -3.4, -2.2, -0.7, -0.05, 0.05, 0.9, 1.6, 3.1, 5.9}) {
    const double step = 1e-5;
    with_case(c, [&](const auto& f) {
      const auto point = f.at(z);
      CHECK_CLOSE(point.value, f.value(z), 1e-15);
      CHECK_CLOSE(point.derivative, (f.value(z + step) - f.value(z - step)) / (2 * step), 1e-8);
      CHECK(point.derivative > 0);
      const std::vector<double> gradient = coefficient_gradient(c, f, z);
      for (size_t i = 0; i < c.coefficients.size(); ++i) {
        Case above = c, below = c;
        above.coefficients[i] += step;
        below.coefficients[i] -= step;
        CHECK_CLOSE(gradient[i], (value_of(above, z) - value_of(below, z)) / (2 * step), 1e-8);
      }
    });
  }
}

void test_increasing(const Case& c) {
  double previous = -std::numeric_limits<double>::infinity();
  for (double z = -60; z <= 60; z += 0.01) {
    const double value = value_of(c, z);
    CHECK(value >= previous);
    previous = value;
  }
}

void test_special_values(const Case& c) {
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(!std::isnan(value_of(c, infinity)));
  CHECK(!std::isnan(value_of(c, -infinity)));
  CHECK(std::isnan(value_of(c, std::numeric_limits<double>::quiet_NaN())));
}

void test_inner() {
  for (const double scale : {0.25, 1.0, 3.0}) {
    for (const double cap : {0.0, 2.0, 30.0}) {
      const Inner<double> inner(scale, cap);
      for (const double z : {-7.3, -0.7, 0.0, 0.05, 1.6, 5.9}) {
        const double step = 1e-6, wanted = cap == 0 ? scale * z : cap * std::tanh(scale * z / cap);
        CHECK_CLOSE(inner.value(z), wanted, 1e-15);
        CHECK(inner.at(z).value == inner.value(z));
        CHECK_CLOSE(inner.at(z).derivative, (inner.value(z + step) - inner.value(z - step)) / (2 * step), 1e-8);
      }
      const double infinity = std::numeric_limits<double>::infinity();
      CHECK(inner.value(infinity) == (cap == 0 ? infinity : cap));
      CHECK(inner.value(-infinity) == (cap == 0 ? -infinity : -cap));
      CHECK(std::isfinite(inner.at(-infinity).derivative));
      CHECK(std::isnan(inner.value(std::numeric_limits<double>::quiet_NaN())));
    }
  }
}

void test_search() {
  const double sorted[] = {-2, -1, 0.5, 0.5, 3, 7, 8};
  const auto at = [&](double i) { return sorted[static_cast<int64_t>(i)]; };
  for (int64_t count = 0; count <= 7; ++count) {
    for (double x = -3; x <= 9; x += 0.25) {
      int64_t wanted = 0;
      while (wanted < count && sorted[wanted] <= x) ++wanted;
      CHECK(CountLessEqual<double>(count)(x, at) == static_cast<double>(wanted));
    }
    CHECK(CountLessEqual<double>(count)(std::numeric_limits<double>::infinity(), at) == static_cast<double>(count));
    CHECK(CountLessEqual<double>(count)(std::numeric_limits<double>::quiet_NaN(), at) == 0.0);
  }
}

void test_registry() {
  int known = 0;
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST)                    \
  ++known;                                                           \
  {                                                                  \
    TransformShape shape;                                            \
    CHECK(find_transform(NAME, &shape) && shape.table_rows == ROWS); \
    bool tested = false;                                             \
    for (const Case& c : kCases) tested = tested || c.name == NAME;  \
    CHECK(tested);                                                   \
  }
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
  CHECK(known == static_cast<int>(kCases.size()));
  TransformShape shape;
  CHECK(!find_transform("no such transform", &shape));
}

}  // namespace
}  // namespace monosoftmax::test

int main() {
  using namespace monosoftmax::test;
  for (const Case& c : kCases) {
    test_derivatives(c);
    test_increasing(c);
    test_special_values(c);
  }
  test_inner();
  test_search();
  test_registry();
  return failures == 0 ? 0 : 1;
}
