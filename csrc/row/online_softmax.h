// The log-sum-exp of a row that arrives in blocks.
#pragma once

#include <cmath>
#include <limits>

#include "../transforms/arithmetic.h"

namespace monosoftmax {

// The largest value y so far, and sum exp(y - largest). The backward pass takes these two numbers, not lse. For
// p = exp(y - largest) / sum repeats the exponentials of the sum exactly and rounds once more. So the p of a row add up
// to 1, and a p next to 1 keeps its 1 - p. exp(y - lse) would carry the rounding of lse, 1e-6 at lse = 20, into every
// p. The sum is in double, which costs one addition for each block.
//
// A block is added in two steps. shift() takes the largest value of the block, and returns the number to subtract from
// its values. add() takes the sum of their exponentials: if a value is NaN, this sum must be NaN. -inf contributes 0.
template <class S>
class OnlineSoftmax {
 public:
  MONOSOFTMAX_HD S shift(S block_largest) {
    if (largest_ < block_largest) {
      if (sum_ > 0) sum_ *= std::exp(static_cast<double>(largest_) - block_largest);
      largest_ = block_largest;
    }
    return largest_ == -kInfinity ? S(0) : largest_;
  }
  MONOSOFTMAX_HD void add(double block_sum) { sum_ += block_sum; }
  // Adds another part of the same row.
  MONOSOFTMAX_HD void merge(const OnlineSoftmax& part) {
    shift(part.largest_);
    sum_ += part.largest_ == largest_ ? part.sum_ : part.sum_ * std::exp(static_cast<double>(part.largest_) - largest_);
  }

  MONOSOFTMAX_HD S largest() const { return largest_; }
  MONOSOFTMAX_HD double unrounded_sum() const { return sum_; }
  // The sum is 0 for a row of -inf only. Such a row has no distribution: its p and its log_sum are NaN.
  MONOSOFTMAX_HD S sum() const { return static_cast<S>(sum_); }
  MONOSOFTMAX_HD S log_sum() const { return sum_ == 0 ? kNaN : static_cast<S>(std::log(sum_)); }
  MONOSOFTMAX_HD S lse() const { return sum_ == 0 ? -kInfinity : largest_ + log_sum(); }

 private:
  static constexpr S kInfinity = std::numeric_limits<S>::infinity();
  static constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();

  S largest_ = -kInfinity;
  double sum_ = 0;
};

// The same, and the sum of exp(y - largest) (largest - y), from which comes the entropy log(sum) + gap. No terms
// cancel: all of them are positive relative to the largest y so far, and stay so relative to a larger one.
template <class S>
class OnlineEntropy {
 public:
  MONOSOFTMAX_HD S shift(S block_largest) {
    const S before = softmax_.largest();
    const double sum = softmax_.unrounded_sum();
    const S result = softmax_.shift(block_largest);
    if (sum > 0 && softmax_.largest() != before) {
      const double rise = static_cast<double>(softmax_.largest()) - before;
      gaps_ = (gaps_ + sum * rise) * std::exp(-rise);
    }
    return result;
  }
  MONOSOFTMAX_HD void add(double block_sum, double block_gaps) {
    softmax_.add(block_sum);
    gaps_ += block_gaps;
  }

  MONOSOFTMAX_HD const OnlineSoftmax<S>& softmax() const { return softmax_; }
  // sum_j p_j (largest - y_j). NaN for a row of -inf only, which has no distribution.
  MONOSOFTMAX_HD double gap() const {
    const double sum = softmax_.unrounded_sum();
    return sum == 0 ? std::numeric_limits<double>::quiet_NaN() : gaps_ / sum;
  }

 private:
  OnlineSoftmax<S> softmax_;
  double gaps_ = 0;
};

}  // namespace monosoftmax
