// From a plan and the name of a transform to the kernel, for one type of logits: a .cu file each, so that they compile
// side by side.
#pragma once

#include "../transforms/registry.h"
#include "cross_entropy.cuh"
#include "launch_kernel.cuh"

namespace monosoftmax::cuda {

// Defined by a file for each type.
template <class E>
void launch_cross_entropy_of(const Plan& plan, std::string_view transform, const CrossEntropyArguments& arguments,
                             Stream stream);

template <class Transform, class T, class E>
class CrossEntropyLaunch {
 public:
  CrossEntropyLaunch(const Plan& plan, const CrossEntropyArguments& arguments, Stream stream)
      : plan_(plan), arguments_(arguments), stream_(stream) {
    arguments_.sums_offset = plan.sums_offset;
    arguments_.row_offset = plan.row_offset;
    arguments_.sums.atomic = plan.atomic;
  }

  void losses() const { launch(cross_entropy_kernel<Transform, T, E>); }
  template <class Sums>
  void gradient() const {
    if (plan_.rows == Rows::kResident) {
      launch(cross_entropy_gradient_kernel<Transform, T, Sums, E, true>);
    } else {
      reread<Sums>();
    }
  }
  template <class Sums>
  void reread() const {
    launch(cross_entropy_gradient_kernel<Transform, T, Sums, E, false>);
  }

 private:
  void launch(void (*kernel)(CrossEntropyArguments)) const {
    launch_kernel<CrossEntropyArguments>(kernel, {plan_.blocks, plan_.threads, plan_.shared_bytes, plan_.cluster},
                                         stream_, arguments_);
  }

  const Plan& plan_;
  CrossEntropyArguments arguments_;
  Stream stream_;
};

template <template <class> class F, int kRows, int kSmallest, int kLargest, class E>
void launch_transform(const Plan& plan, const CrossEntropyArguments& arguments, Stream stream) {
  using T = LogitsOf<kRows, kSmallest, kLargest>;
  const CrossEntropyLaunch<VectorTransform<F, T>, T, E> launch(plan, arguments, stream);
  if (plan.rows == Rows::kOnce) {
    launch.losses();
  } else if (plan.sums == SumsKind::kNone) {
    launch.template gradient<NoSums>();
  } else if constexpr (kLargest > 0 && kSmallest == kLargest) {
    launch.template gradient<VectorSums<T, kLargest>>();
  } else if constexpr (kLargest > 0) {
    launch.template gradient<LaneSums<F<T>, T>>();
  }
}

template <template <class, bool> class F, int kRows, int kSmallest, int kLargest, class E>
void launch_transform(const Plan& plan, const CrossEntropyArguments& arguments, Stream stream) {
  using T = LogitsOf<kRows, kSmallest, kLargest>;
  if (plan.table_in_shared_memory) {
    const CrossEntropyLaunch<TableTransform<F, T, true>, T, E> launch(plan, arguments, stream);
    if (plan.rows == Rows::kOnce) {
      launch.losses();
    } else if (plan.sums == SumsKind::kNone) {
      launch.template gradient<NoSums>();
    } else {
      launch.template gradient<LaneSums<F<T, true>, T>>();
    }
  } else {
    const CrossEntropyLaunch<TableTransform<F, T, false>, T, E> launch(plan, arguments, stream);
    if (plan.rows == Rows::kOnce) {
      launch.losses();
    } else if (plan.sums == SumsKind::kNone) {
      launch.template reread<NoSums>();
    } else {
      launch.template reread<WarpSums<F<T, false>, T>>();
    }
  }
}

template <class E>
void launch_cross_entropy_of(const Plan& plan, std::string_view transform, const CrossEntropyArguments& arguments,
                             Stream stream) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST)                                 \
  if (transform == NAME) {                                                        \
    launch_transform<CLASS, ROWS, SMALLEST, LARGEST, E>(plan, arguments, stream); \
    return;                                                                       \
  }
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
}

}  // namespace monosoftmax::cuda
