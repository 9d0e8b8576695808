// Fibers: stacks that the program switches between.
#pragma once

#include <cstddef>
#include <vector>

#include "runtime.h"

#if !defined(__x86_64__) || defined(MONOSOFTMAX_CUDA_HOST_UCONTEXT)
#define MONOSOFTMAX_CUDA_HOST_USES_UCONTEXT
#include <ucontext.h>
#endif

namespace monosoftmax::cuda::host {

struct Fiber {
  char* stack = nullptr;  // lowest address; only the address sanitizer knows it for the fiber that called launch()
  size_t stack_bytes = 0;
  void* sanitizer_state = nullptr;
  void* sanitizer_thread = nullptr;
#ifdef MONOSOFTMAX_CUDA_HOST_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// The resources of fibers, which later fibers use again: stacks, and the threads that the thread sanitizer takes fibers
// for. A page without access lies below each stack, and the system provides the memory of a stack as it is touched.
class Slots {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  struct Slot {
    char* stack;
    void* sanitizer_thread;
  };

  // Makes at least this many slots.
  void provide(size_t count);
  const Slot& operator[](size_t index) const { return slots_[index]; }

 private:
  std::vector<Slot> slots_;
};

// Makes a fiber that begins with main(), which must not return, when first switched to.
void prepare(Fiber* fiber, const Slots::Slot& slot, size_t stack_bytes, void (*main)());
// Goes on with `to`. Returns when something switches back to `from`.
void switch_fiber(Fiber* from, Fiber* to);
// Goes on with `to` for good.
[[noreturn]] void end_fiber(Fiber* from, Fiber* to);
// main() must call this first. `caller` is the fiber that switched to the very first fiber.
void enter_fiber(Fiber* caller);

// Maps memory that reads as zero.
void* map_memory(size_t bytes);
void unmap_memory(void* memory, size_t bytes);

}  // namespace monosoftmax::cuda::host
