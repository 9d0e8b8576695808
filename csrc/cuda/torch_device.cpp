#include "torch_device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

namespace monosoftmax::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

std::mutex mutex;
std::map<int, Device> devices;
Tuning tuning;

// Asks torch once for each device.
const Device& device_number(int index) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(index);
  if (found != devices.end()) return found->second;
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  return devices
      .emplace(index, Device{capability, attribute(cudaDevAttrMultiProcessorCount, index),
                             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                             attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index), tuning})
      .first->second;
}

}  // namespace

struct OnDeviceOf::State {
  c10::cuda::CUDAGuard guard;
  int index;
};

OnDeviceOf::OnDeviceOf(const at::Tensor& tensor)
    : state_(new State{c10::cuda::CUDAGuard(tensor.device()), tensor.get_device()}) {}
OnDeviceOf::~OnDeviceOf() = default;

const Device& OnDeviceOf::device() const { return device_number(state_->index); }

Stream OnDeviceOf::stream() const { return c10::cuda::getCurrentCUDAStream(state_->index).stream(); }

void tune(const Tuning& wanted) {
  check(wanted);
  const std::lock_guard<std::mutex> lock(mutex);
  tuning = wanted;
  for (auto& [index, device] : devices) device.tuning = wanted;
}

bool is_ours(const at::Tensor& tensor) { return tensor.is_cuda(); }

}  // namespace monosoftmax::cuda
