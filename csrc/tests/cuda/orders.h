// The orders in which blocks and threads can run: a kernel is tested in all of them.
#pragma once

#include "cuda/platform.h"

namespace monosoftmax::test {

inline constexpr cuda::host::Order kOrders[] = {cuda::host::Order::kForward, cuda::host::Order::kReverse,
                                                cuda::host::Order::kRandom};
inline constexpr const char* kOrderNames[] = {"forward", "reverse", "random"};

template <class Function>
void in_every_order(Function function) {
  for (const auto order : kOrders) {
    cuda::host::set_order(order);
    function();
  }
  cuda::host::set_order(cuda::host::Order::kForward);
}

}  // namespace monosoftmax::test
