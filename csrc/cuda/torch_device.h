// Questions of the operators about the device of a tensor: torch_device.cpp, or host/torch_device.cpp on the host.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "launch.h"

namespace monosoftmax::cuda {

// While this object lives, the device of the tensor is the current one.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const at::Tensor& tensor);
  ~OnDeviceOf();
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  const Device& device() const;
  Stream stream() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Sets the tuning for all devices, for benchmarks. No other thread may be in an operator meanwhile.
void tune(const Tuning&);

// Whether the kernels can work on the memory of a tensor.
bool is_ours(const at::Tensor& tensor);

}  // namespace monosoftmax::cuda
