// Divides a call among torch's threads, and adds up the sums of the shares.
#pragma once

#include <ATen/DimVector.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#ifdef MONOSOFTMAX_X86
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace monosoftmax::cpu {

// While this object lives, its thread rounds results below the smallest normal number to 0. Such small probabilities
// are common, and each costs a hundred cycles on x86 processors.
class FlushSubnormals {
#ifdef MONOSOFTMAX_X86
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#endif
};

// Divides the rows of a call into one contiguous share for each thread. The shares depend only on the shape and the
// number of threads, so that sums over them are the same in every run. If there are fewer rows than threads, the
// columns of each row are divided instead, unless they are too few.
class Shares {
 public:
  Shares(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        by_columns_(rows < at::get_num_threads() && columns >= 2 * kFewestColumns),
        count_(by_columns_ ? std::min<int64_t>(columns / kFewestColumns, at::get_num_threads())
                           : std::min<int64_t>(rows, at::get_num_threads())) {}

  int64_t count() const { return count_; }
  bool by_columns() const { return by_columns_; }
  // Calls work(share, begin, end) with the rows of each share, or with the columns of each share of a row.
  template <class Work>
  void for_each(Work&& work) const {
    const int64_t units = by_columns_ ? columns_ : rows_;
    at::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      const FlushSubnormals flush;
      for (int64_t share = first; share < last; ++share) {
        work(share, begin_of(share, units), begin_of(share + 1, units));
      }
    });
  }

 private:
  static constexpr int64_t kFewestColumns = 4096;
  int64_t begin_of(int64_t share, int64_t units) const { return units * share / count_; }

  int64_t rows_, columns_;
  bool by_columns_;
  int64_t count_;
};

// The sums for the gradient of the coefficients in double precision, one set for each share.
class CoefficientSums {
 public:
  CoefficientSums(const TransformArguments& transform, const Shares& shares, bool needed)
      : transform_(transform), needed_(needed) {
    const Tensor& like = transform.coefficients();
    if (needed && like.numel() > 0) {
      at::DimVector sizes(like.sizes());
      sizes.insert(sizes.begin(), shares.count());
      sums_ = at::zeros(sizes, like.options().dtype(at::kDouble));
    }
  }
  double* share(int64_t index) {
    return sums_.defined() ? sums_.mutable_data_ptr<double>() + index * sums_.stride(0) : nullptr;
  }
  // The gradient of the coefficients, in the shape of the coefficients. Empty if it is not needed.
  Tensor total() const {
    if (!needed_) return nothing_like(transform_.given());
    const Tensor& given = transform_.given();
    Tensor total = at::empty(given.sizes(), given.options());
    if (!sums_.defined()) return total;
    const Tensor sum = sums_.size(0) == 1 ? sums_ : sums_.sum(0);
    if (given.scalar_type() == at::kDouble) {
      round_into<double>(total, sum.const_data_ptr<double>());
    } else {
      round_into<float>(total, sum.const_data_ptr<double>());
    }
    return total;
  }

 private:
  // Rounds sums in the layout of the kernels. The layout of a table changes from [pieces, stride] to [rows, pieces].
  template <class S>
  void round_into(Tensor& total, const double* sum) const {
    S* to = total.mutable_data_ptr<S>();
    const int64_t rows = transform_.table_rows() == 0 ? 1 : transform_.table_rows();
    const int64_t size = total.size(-1), stride = transform_.table_rows() == 0 ? 1 : transform_.coefficients().size(1);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < size; ++k) to[r * size + k] = static_cast<S>(sum[k * stride + r]);
    }
  }

  const TransformArguments& transform_;
  bool needed_;
  Tensor sums_;
};

// Calls work(share, begin, end, first, last) with the rows [begin, end) and columns [first, last) of every share.
template <class Work>
void for_each_block(const Shares& shares, const Tensor& rows, Work&& work) {
  if (!shares.by_columns()) {
    shares.for_each([&](int64_t share, int64_t begin, int64_t end) { work(share, begin, end, 0, rows.size(1)); });
    return;
  }
  shares.for_each([&](int64_t share, int64_t first, int64_t last) { work(share, 0, rows.size(0), first, last); });
}

}  // namespace monosoftmax::cpu
