// The device of the host execution: any GPU that a test names.
#include "../torch_device.h"

#include "device_settings.h"

namespace monosoftmax::cuda {

struct OnDeviceOf::State {};

OnDeviceOf::OnDeviceOf(const at::Tensor&) {}
OnDeviceOf::~OnDeviceOf() = default;

const Device& OnDeviceOf::device() const { return host::device(); }

Stream OnDeviceOf::stream() const { return nullptr; }

bool is_ours(const at::Tensor& tensor) { return tensor.is_cpu(); }

}  // namespace monosoftmax::cuda
