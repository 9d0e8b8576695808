// Kernels with one defect each, and clean ones, for test_host_defects.cpp.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/platform.h"

namespace monosoftmax::test {

using cuda::host::Build;
using cuda::host::launch;

inline constexpr const char* kUnseen = nullptr;  // the build cannot tell: not run there
inline constexpr const char* kRace = "ThreadSanitizer: data race";
inline constexpr const char* kPoison = "AddressSanitizer: use-after-poison";
inline constexpr const char* kOverflow = "AddressSanitizer: heap-buffer-overflow";
inline constexpr const char* kNaN = "NaN in the output";

struct Case {
  const char* kernel;
  // Launches it, and looks at its output.
  void (*run)();
  // What is reported in each build, whatever the order of blocks and threads. "" for a clean kernel: nothing.
  const char *plain, *address, *thread;
};

// A defect with the same report everywhere.
constexpr Case everywhere(const char* kernel, void (*run)(), const char* report) {
  return {kernel, run, report, report, report};
}
constexpr Case race(const char* kernel, void (*run)()) { return {kernel, run, kUnseen, kUnseen, kRace}; }
constexpr Case clean(const char* kernel, void (*run)()) { return everywhere(kernel, run, ""); }

// Memory of exactly as many numbers, so that the address sanitizer sees where they end.
class Numbers {
 public:
  explicit Numbers(size_t size) : size_(size), data_(new float[size]()) {}
  float* data() { return data_.get(); }
  float& operator[](size_t i) { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::unique_ptr<float[]> data_;
};

inline constexpr int kBadOutputExitCode = 97;

inline void expect_no_nan(Numbers& numbers) {
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (!std::isnan(numbers[i])) continue;
    std::fprintf(stderr, "NaN in the output, number %zu\n", i);
    std::exit(kBadOutputExitCode);
  }
}

template <class Wanted>
void expect_each(Numbers& numbers, Wanted wanted) {
  for (size_t i = 0; i < numbers.size(); ++i) {
    const auto right = static_cast<float>(wanted(i));
    if (numbers[i] == right) continue;
    std::fprintf(stderr, "number %zu of the output is %g, wanted %g\n", i, static_cast<double>(numbers[i]),
                 static_cast<double>(right));
    std::exit(kBadOutputExitCode);
  }
}

// Launches a kernel of an output alone, and expects numbers in it.
template <auto kernel, unsigned blocks = 1, unsigned threads = 64, size_t shared_bytes = 0, unsigned cluster = 1>
void run() {
  Numbers out(size_t{blocks} * threads);
  launch(kernel, {.grid = blocks, .block = threads, .shared_bytes = shared_bytes, .cluster = cluster}, out.data());
  expect_no_nan(out);
}

}  // namespace monosoftmax::test
