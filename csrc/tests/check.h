// The checks of the C++ tests: each failure is printed with its place, and main() returns their number.
#pragma once

#include <cmath>
#include <cstdio>

namespace monosoftmax::test {

inline int failures = 0;

inline void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
}

inline void check_close(double got, double wanted, double tolerance, const char* what, const char* file, int line) {
  const double error = std::fabs(got - wanted);
  if (error <= tolerance * std::fmax(1.0, std::fabs(wanted))) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: failed: %s is %.17g, wanted %.17g\n", file, line, what, got, wanted);
}

}  // namespace monosoftmax::test

#define CHECK(condition) ::monosoftmax::test::check(condition, #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(got, wanted, tolerance) \
  ::monosoftmax::test::check_close(got, wanted, tolerance, #got, __FILE__, __LINE__)
