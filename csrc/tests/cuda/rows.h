// What the tests of the kernels share: every transform with some coefficients, numbers, and rows in memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/launch.h"
#include "cuda/platform.h"
#include "transforms/registry.h"

namespace monosoftmax::cuda::test {

struct Case {
  const char* transform;
  std::vector<float> coefficients;  // a row of a table after the other
  std::vector<double> constants;
  int rows;  // of a table; 1 for a vector

  int64_t size() const { return static_cast<int64_t>(coefficients.size()) / rows; }
};

inline const Case kCases[] = {
    {"identity", {}, {}, 1},
    {"temperature", {1.7f}, {}, 1},
    {"plif", {0.5f, 2, 1, 0.25f, 0.75f, -5, -4, 0, 2, 2.5f}, {-4, 2, 0.5}, 2},
    {"sigsoftmax", {}, {}, 1},
    {"gss", {2.5f, -1.5f}, {}, 1},
    {"soft_cap", {3}, {}, 1},
    {"sigmoid_cap", {23, 5, 7.5f}, {}, 1},
    {"monotonic_mlp", {0.8f, 0.5f, 1.5f, 0.7f, 2, -1, 0.3f}, {}, 1},
    {"spline", {-3, -1, 0, 2, 1, 2, -2, -1.5f, 0, 0.5f, 1.5f, 3, 0.5f, 1, 2, 1, 2, 0.7f}, {}, 6},
};

// The coefficients of a case in double, as the transforms of the CPU take them.
inline std::vector<double> coefficients_of(const Case& c) {
  std::vector<double> data(c.coefficients.begin(), c.coefficients.end());
  if (c.rows == 1) return data;
  const int stride = table_stride(c.rows);
  data.assign(c.size() * stride, 0);
  for (int64_t k = 0; k < c.size(); ++k) {
    for (int r = 0; r < c.rows; ++r) data[k * stride + r] = c.coefficients[r * c.size() + k];
  }
  complete_table(c.transform, data.data(), c.size(), c.constants.data());
  return data;
}

inline TransformArguments arguments_of(const Case& c) {
  TransformArguments result{c.coefficients.data(), c.size(), {}, nullptr};
  for (size_t i = 0; i < c.constants.size(); ++i) result.constants[i] = c.constants[i];
  return result;
}

// Adds factor * df/dcoefficient at a point to `sums`, of the layout of the coefficients.
template <class F>
void add_to_coefficients(const Case& c, const F& f, const typename F::Point& point, double logit, double factor,
                         std::vector<double>& sums) {
  double factors[kMostVectorCoefficients] = {};
  size_t begin = 0, step = 1, count = c.coefficients.size();
  if constexpr (F::kTableRows > 0) {
    double of_piece[F::kTableRows];
    f.differentiate(point, logit, of_piece);
    for (int r = 0; r < F::kTableRows; ++r) factors[r] = of_piece[r];
    begin = static_cast<size_t>(point.piece);
    step = c.size();
    count = F::kTableRows;
  } else {
    f.accumulate(point, logit, 1.0, factors);
  }
  for (size_t i = 0; i < count; ++i) sums[begin + i * step] += factor * factors[i];
}

class Numbers {
 public:
  explicit Numbers(unsigned seed) : state_(seed) {}
  // From -1 to 1.
  float operator()() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int>(state_ >> 8) - (1 << 23)) / (1 << 23);
  }

 private:
  unsigned state_;
};

inline float narrow(float x, float*) { return x; }
inline __nv_bfloat16 narrow(float x, __nv_bfloat16*) { return __float2bfloat16_rn(x); }
inline __half narrow(float x, __half*) { return __float2half_rn(x); }
inline float widen(float x) { return x; }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widen(__half x) { return __half2float(x); }
inline ElementType type_of(float*) { return ElementType::kFloat; }
inline ElementType type_of(__nv_bfloat16*) { return ElementType::kBFloat16; }
inline ElementType type_of(__half*) { return ElementType::kHalf; }
inline double rounding_of(float*) { return 0; }
inline double rounding_of(__nv_bfloat16*) { return 1.0 / 256; }
inline double rounding_of(__half*) { return 1.0 / 2048; }

// Memory that ends with the last element, and begins anywhere.
template <class T>
class Buffer {
 public:
  Buffer(size_t count, int offset) : data_(new T[count + offset]), offset_(offset) {}
  T* get() { return data_.get() + offset_; }

 private:
  std::unique_ptr<T[]> data_;
  int offset_;
};

}  // namespace monosoftmax::cuda::test
