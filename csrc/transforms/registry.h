// The transforms by name. For a new transform, add its header and its row here.
#pragma once

#include <string_view>

#include "gss.h"
#include "identity.h"
#include "monotonic_mlp.h"
#include "plif.h"
#include "sigmoid_cap.h"
#include "sigsoftmax.h"
#include "soft_cap.h"
#include "spline.h"
#include "temperature.h"

// name, class, rows of its coefficient table (0: a vector), smallest and largest number of coefficients in a row
#define MONOSOFTMAX_TRANSFORMS(ROW)            \
  ROW("identity", Identity, 0, 0, 0)           \
  ROW("temperature", Temperature, 0, 1, 1)     \
  ROW("plif", Plif, 2, 1, 1 << 24)             \
  ROW("sigsoftmax", SigSoftmax, 0, 0, 0)       \
  ROW("gss", Gss, 0, 2, 2)                     \
  ROW("soft_cap", SoftCap, 0, 1, 1)            \
  ROW("sigmoid_cap", SigmoidCap, 0, 3, 3)      \
  ROW("monotonic_mlp", MonotonicMlp, 0, 4, 64) \
  ROW("spline", Spline, 6, 1, 1 << 24)

namespace monosoftmax {

// The most coefficients of a transform without a table: kernels keep the gradients of these coefficients in registers.
constexpr int kMostVectorCoefficients = 64;

struct TransformShape {
  int table_rows;
  int64_t smallest, largest;
};

// Whether there is a transform `name`; if so, the shape of its coefficients.
inline bool find_transform(std::string_view name, TransformShape* shape) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST) \
  if (name == NAME) {                             \
    *shape = {ROWS, SMALLEST, LARGEST};           \
    return true;                                  \
  }
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
  return false;
}

template <template <class> class F, class S>
void derive_columns(S*, int64_t, const double*) {}
template <template <class, bool> class F, class S>
void derive_columns(S* table, int64_t pieces, const double* constants) {
  constexpr int stride = table_stride(F<S, false>::kTableRows);
  for (int64_t k = 0; k < pieces; ++k) F<S, false>::derive(table + k * stride, k, constants);
}

// Writes the numbers that transform `name` derives from its coefficients into the table, if it derives any.
template <class S>
void complete_table(std::string_view name, S* table, int64_t pieces, const double* constants) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST) \
  if (name == NAME) derive_columns<CLASS, S>(table, pieces, constants);
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
}

// Transforms with a vector of coefficients are templates of the type of the arithmetic. Transforms with a table have
// one more template argument: whether the table is small.
template <template <class> class F, class T, int kRows, class Visitor>
void visit_transform(const Coefficients<typename Arithmetic<T>::Scalar>& coefficients, Visitor&& visitor) {
  static_assert(F<T>::kTableRows == 0 && kRows == 0, "the registry has the rows of the table");
  visitor(F<T>(coefficients));
}
template <template <class, bool> class F, class T, int kRows, class Visitor>
void visit_transform(const Coefficients<typename Arithmetic<T>::Scalar>& coefficients, Visitor&& visitor) {
  static_assert(F<T, false>::kTableRows == kRows, "the registry has the rows of the table");
  constexpr int64_t small = Arithmetic<T>::small_table(kRows);
  if constexpr (small > 0) {
    if (coefficients.size <= small) {
      visitor(F<T, true>(coefficients));
      return;
    }
  }
  visitor(F<T, false>(coefficients));
}

// Calls visitor(f) with the transform `name` over the arithmetic type T. Returns whether there is such a transform.
template <class T, class Visitor>
bool with_transform(std::string_view name, const Coefficients<typename Arithmetic<T>::Scalar>& coefficients,
                    Visitor&& visitor) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST)           \
  if (name == NAME) {                                       \
    visit_transform<CLASS, T, ROWS>(coefficients, visitor); \
    return true;                                            \
  }
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
  return false;
}

}  // namespace monosoftmax
