// The loss of one row for class probabilities t, and its gradient with respect to the transformed logits y.
//
//   loss = sum_j q_j (lse - y_j) + z_loss lse^2,   q_j = ((1 - eps) t_j + eps / V) w_j
//   dL/dy_j = g (Q p_j - q_j) + (2 z_loss lse g + h) p_j,   Q = sum_j q_j
//
// g and h are the upstream gradients of the loss and of lse. Label smoothing eps and class weights w are as in
// torch.nn.functional.cross_entropy. A class with q = 0 adds nothing, even if its y is -inf.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "online_softmax.h"

namespace monosoftmax {

template <class S>
struct ProbabilityOptions {
  int64_t classes;
  double label_smoothing;
  double z_loss;
  const S* weight;  // [classes], or null for weights of 1

  // q = kept t w + spread w
  MONOSOFTMAX_HD S kept() const { return static_cast<S>(1 - label_smoothing); }
  MONOSOFTMAX_HD S spread() const { return static_cast<S>(label_smoothing / static_cast<double>(classes)); }
};

// The sums over a part of a row, which arrives in blocks as for OnlineSoftmax: an OnlineSoftmax, Q, and the sum of q_j
// times the gap of y_j to the largest y. If all q have one sign, all terms of the loss have one sign, and none cancel.
template <class S>
class ProbabilityPart {
 public:
  MONOSOFTMAX_HD S shift(S block_largest) {
    const S before = softmax_.largest();
    const S shift = softmax_.shift(block_largest);
    gaps_ = gaps_to(softmax_.largest(), before);
    return shift;
  }
  // Sums over the block of exp(y - shift), of q, and of q (y - shift) where q is not 0.
  MONOSOFTMAX_HD void add(double block_sum, double block_mass, double block_gaps) {
    softmax_.add(block_sum);
    mass_ += block_mass;
    gaps_ += block_gaps;
  }
  // Adds another part of the same row.
  MONOSOFTMAX_HD void merge(const ProbabilityPart& part) {
    const S before = softmax_.largest();
    softmax_.merge(part.softmax_);
    gaps_ = gaps_to(softmax_.largest(), before) + part.gaps_to(softmax_.largest(), part.softmax_.largest());
    mass_ += part.mass_;
  }

  MONOSOFTMAX_HD const OnlineSoftmax<S>& softmax() const { return softmax_; }
  MONOSOFTMAX_HD S mass() const { return static_cast<S>(mass_); }
  MONOSOFTMAX_HD S loss(const ProbabilityOptions<S>& options) const {
    double result = mass_ * softmax_.log_sum() - gaps_;
    if (options.z_loss > 0) result += options.z_loss * static_cast<double>(softmax_.lse()) * softmax_.lse();
    return static_cast<S>(result);
  }

 private:
  // If every y so far is -inf, the gaps are -inf, or 0 if Q is 0. Both are right for any largest y.
  MONOSOFTMAX_HD double gaps_to(S largest, S before) const {
    if (largest == before || before == -std::numeric_limits<S>::infinity()) return gaps_;
    return gaps_ + mass_ * (static_cast<double>(before) - largest);
  }

  OnlineSoftmax<S> softmax_;
  double mass_ = 0, gaps_ = 0;
};

// dL/dy_j = of_p p_j - g q_j + extra_of_p p_j. The first two terms cancel if p is next to 1: see RowLoss.
template <class S>
struct ProbabilityGradient {
  S of_p, extra_of_p;

  MONOSOFTMAX_HD ProbabilityGradient(const ProbabilityOptions<S>& options, S mass, S grad_loss, S grad_lse, S largest,
                                     S sum)
      : of_p(grad_loss * mass), extra_of_p(grad_lse) {
    if (options.z_loss > 0) {
      const double lse = largest + std::log(static_cast<double>(sum));
      extra_of_p = static_cast<S>(grad_lse + 2 * grad_loss * options.z_loss * lse);
    }
  }
};

}  // namespace monosoftmax
