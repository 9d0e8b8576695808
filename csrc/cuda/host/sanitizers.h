// The interfaces of the sanitizers that the runtime needs, empty in builds without them.
#pragma once

#include <cstddef>

#include "runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MONOSOFTMAX_CUDA_HOST_THREAD
#include <sanitizer/tsan_interface.h>
#endif

// The address sanitizer: which memory may be accessed, and which stack the program uses.
namespace monosoftmax::cuda::host::address {

#ifdef __SANITIZE_ADDRESS__
inline void forbid(const void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
inline void allow(const void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
inline void leave_stack(void** state, const void* to, size_t bytes) {
  __sanitizer_start_switch_fiber(state, to, bytes);
}
inline void enter_stack(void* state, const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(state, from, bytes);
}
#else
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
#endif

}  // namespace monosoftmax::cuda::host::address

// The thread sanitizer: the thread that the program acts as, and the order of memory. acquire() in one thread comes
// after everything that another thread did before its release() of the same address.
namespace monosoftmax::cuda::host::threads {

#ifdef MONOSOFTMAX_CUDA_HOST_THREAD
inline void* create() { return __tsan_create_fiber(0); }
inline void name(void* thread, const char* words) { __tsan_set_fiber_name(thread, words); }
inline void* acting() { return __tsan_get_current_fiber(); }
inline void act_as(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
#else
inline void* create() { return nullptr; }
inline void name(void*, const char*) {}
inline void* acting() { return nullptr; }
inline void act_as(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace monosoftmax::cuda::host::threads
