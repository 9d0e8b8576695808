// The loss of one row and its gradient with respect to the transformed logits y.
//
//   loss = sum_j q_j (lse - y_j) + z_loss lse^2,   q_j = (1 - eps) w_t [j = t] + eps / V w_j
//   dL/dy_j = g (Q p_j - q_j) + (2 z_loss lse g + h) p_j,   Q = sum_j q_j
//
// g and h are the upstream gradients of the loss and of lse. Label smoothing eps and class weights w are as in
// torch.nn.functional.cross_entropy.
#pragma once

#include <cmath>
#include <cstdint>

#include "../transforms/arithmetic.h"

namespace monosoftmax {

// Wide: the type for the few numbers of a row.
template <class S, class Wide = double>
struct LossOptions {
  int64_t classes;
  int64_t ignore_index;
  Wide label_smoothing;
  Wide z_loss;
  const S* weight;  // [classes], or null for weights of 1
  Wide weight_sum;  // of all classes

  MONOSOFTMAX_HD S weight_of(int64_t target) const { return weight == nullptr ? S(1) : weight[target]; }
  MONOSOFTMAX_HD bool smooths() const { return label_smoothing > 0; }
};

template <class S, class Wide = double>
class RowLoss {
 public:
  MONOSOFTMAX_HD RowLoss(const LossOptions<S, Wide>& options, int64_t target)
      : z_loss_(options.z_loss),
        target_mass_((1 - options.label_smoothing) * options.weight_of(target)),
        smooth_mass_(options.label_smoothing / static_cast<Wide>(options.classes)),
        weight_sum_(options.weight_sum) {}

  // target_gap is y_t - largest; weighted_gaps is sum_j w_j (y_j - largest), read only if labels are smoothed.
  MONOSOFTMAX_HD S loss(S target_gap, Wide weighted_gaps, S log_sum, S lse) const {
    Wide result = target_mass_ * (log_sum - target_gap);
    if (smooth_mass_ > 0) {
      result += smooth_mass_ * (weight_sum_ * static_cast<Wide>(log_sum) - weighted_gaps);
    }
    if (z_loss_ > 0) result += z_loss_ * static_cast<Wide>(lse) * lse;
    return static_cast<S>(result);
  }

  // dL/dy_j = of_p p_j - (of_target [j = t] + of_weight w_j) + extra_of_p p_j
  //
  // If p is next to 1, the first two terms cancel. The last term, from z_loss and the gradient of lse, must not be
  // rounded with them. of_p is rounded as the kernel rounds the sum of the other parts, so that the first two terms
  // cancel exactly at p = 1.
  struct Gradient {
    S of_p, of_target, of_weight, extra_of_p;
  };
  MONOSOFTMAX_HD Gradient gradient(S grad_loss, S grad_lse, S largest, S sum) const {
    const S of_target = static_cast<S>(grad_loss * target_mass_);
    const S of_weight = static_cast<S>(grad_loss * smooth_mass_);
    const S of_p = of_target + of_weight * static_cast<S>(weight_sum_);
    Wide extra = grad_lse;
    if (z_loss_ > 0) extra += 2 * grad_loss * z_loss_ * (largest + std::log(static_cast<Wide>(sum)));
    return {of_p, of_target, of_weight, static_cast<S>(extra)};
  }

 private:
  Wide z_loss_, target_mass_, smooth_mass_, weight_sum_;
};

}  // namespace monosoftmax
