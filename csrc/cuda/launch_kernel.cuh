// Launches a kernel in a stream, or on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "launch.h"
#include "platform.h"

namespace monosoftmax::cuda {

struct Shape {
  int blocks, threads;
  unsigned shared_bytes = 0;
  int cluster = 1;
};

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Clears the error: otherwise a later, unrelated call would report it.
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("monosoftmax: ") + what + ": " + cudaGetErrorString(error));
}

template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const Shape& shape, Stream stream, Parameters... arguments) {
  constexpr unsigned kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)),
        "a kernel cannot have the shared memory that it was planned with");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  if (shape.cluster > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "a kernel was not launched");
}

#else

template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const Shape& shape, Stream, Parameters... arguments) {
  host::launch(kernel,
               {dim3(shape.blocks), dim3(shape.threads), shape.shared_bytes, static_cast<unsigned>(shape.cluster)},
               arguments...);
}

#endif

}  // namespace monosoftmax::cuda
