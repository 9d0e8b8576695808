// The divergences of p = softmax(y) from q, class by class. Each class adds a term to the loss, and a term t_j to a sum
// from which the gradient with respect to y follows, for an upstream gradient g:
//
//   dL/dy_j = g (t_j - p_j sum_i t_i)
//
//   forward KL   loss = sum_j q_j (log q_j - log p_j)                         t_j = -q_j
//   reverse KL   loss = sum_j p_j (log p_j - log q_j)                         t_j = p_j (log p_j - log q_j)
//   JSD          loss = sum_j beta q_j (log q_j - log m_j) + t_j              t_j = (1 - beta) p_j (log p_j - log m_j)
//                m = beta q + (1 - beta) p
//
// A term whose first factor is 0 is 0, even if a logarithm in it is infinite. q need not add up to 1.
#pragma once

#include <cmath>

#include "../transforms/arithmetic.h"

namespace monosoftmax {

template <class T>
struct DivergenceTerms {
  T loss, gradient;
};

template <class T>
class ForwardKl {
 public:
  using S = typename Arithmetic<T>::Scalar;

  explicit MONOSOFTMAX_HD ForwardKl(S) {}
  MONOSOFTMAX_HD DivergenceTerms<T> of(T log_p, T, T log_q, T q) const {
    using A = Arithmetic<T>;
    return {A::select(A::less_equal(q, T(0)), T(0), q * (log_q - log_p)), T(0) - q};
  }
};

template <class T>
class ReverseKl {
 public:
  using S = typename Arithmetic<T>::Scalar;

  explicit MONOSOFTMAX_HD ReverseKl(S) {}
  MONOSOFTMAX_HD DivergenceTerms<T> of(T log_p, T p, T log_q, T) const {
    using A = Arithmetic<T>;
    const T term = A::select(A::less_equal(p, T(0)), T(0), p * (log_p - log_q));
    return {term, term};
  }
};

// With t = log((1 - beta) p) - log(beta q), log m is the larger of the two logarithms plus log1p(exp(-|t|)). So
//
//   log p - log m = -(log(1 - beta) + max(0, -t) + log1p(exp(-|t|)))
//   log q - log m = -(log(beta) + max(0, t) + log1p(exp(-|t|)))
//
// which neither overflow nor underflow, and lose nothing where p and q are nearly the same but small.
template <class T>
class Jsd {
 public:
  using S = typename Arithmetic<T>::Scalar;

  explicit MONOSOFTMAX_HD Jsd(S beta)
      : beta_(beta),
        complement_(1 - beta),
        log_beta_(std::log(beta)),
        log_complement_(std::log1p(-beta)),
        log_odds_(std::log1p(-beta) - std::log(beta)) {}
  MONOSOFTMAX_HD DivergenceTerms<T> of(T log_p, T p, T log_q, T q) const {
    using A = Arithmetic<T>;
    const T t = T(log_odds_) + (finite(log_p) - finite(log_q));
    const T larger = A::select(A::less(t, T(0)), T(0), t);  // NaN stays NaN
    const T rest = A::log1p(A::decay(t));
    const T of_p = T(complement_) * p * (T(0) - ((T(log_complement_) + (larger - t)) + rest));
    const T of_q = T(beta_) * q * (T(0) - ((T(log_beta_) + larger) + rest));
    return {of_q + of_p, of_p};
  }

 private:
  // The logarithm of 0 is raised, so that 0 times it is 0.
  static MONOSOFTMAX_HD T finite(T log) {
    using A = Arithmetic<T>;
    const T lowest(S(-1e30));
    return A::select(A::less(log, lowest), lowest, log);
  }

  S beta_, complement_, log_beta_, log_complement_, log_odds_;
};

}  // namespace monosoftmax
