// Theoretical occupancy by NVIDIA's cuda_occupancy.h, of devices that are not there: of each line of standard input,
// which describes a device and a launch, how many blocks a multiprocessor can have at once.
//
//   in   major minor threads_of_multiprocessor registers_of_multiprocessor shared_memory_of_multiprocessor
//        shared_memory_of_block reserved_shared_memory multiprocessors
//        registers_of_thread static_shared_bytes dynamic_shared_bytes threads
//   out  blocks
//
// Shared memory of a block is what a kernel may opt in to; reserved is what the driver takes of each block. The
// division into cache and shared memory is left to the driver, as it is by default: as much shared memory as blocks can
// use.
#include <cuda_occupancy.h>

#include <cstddef>
#include <iostream>
#include <sstream>
#include <string>

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    cudaOccDeviceProp device;
    cudaOccFuncAttributes kernel;
    std::size_t dynamic = 0;
    int threads = 0;
    in >> device.computeMajor >> device.computeMinor >> device.maxThreadsPerMultiprocessor >>
        device.regsPerMultiprocessor >> device.sharedMemPerMultiprocessor >> device.sharedMemPerBlockOptin >>
        device.reservedSharedMemPerBlock >> device.numSms >> kernel.numRegs >> kernel.sharedSizeBytes >> dynamic >>
        threads;
    if (!in) {
      std::cerr << "not a launch: " << line << '\n';
      return 1;
    }
    device.warpSize = 32;
    device.maxThreadsPerBlock = 1024;
    device.regsPerBlock = device.regsPerMultiprocessor;
    device.sharedMemPerBlock = 48 << 10;
    kernel.maxThreadsPerBlock = threads;
    kernel.numBlockBarriers = 1;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = dynamic;
    const cudaOccDeviceState state;  // SHAREDMEM_CARVEOUT_DEFAULT
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic);
    if (error != CUDA_OCC_SUCCESS) {
      std::cerr << "cuda_occupancy.h: error " << static_cast<int>(error) << " for " << line << '\n';
      return 1;
    }
    std::cout << result.activeBlocksPerMultiprocessor << '\n';
  }
}
