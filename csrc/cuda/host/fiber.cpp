#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "sanitizers.h"

#ifndef MONOSOFTMAX_CUDA_HOST_USES_UCONTEXT
// Saves the registers that a call preserves on the stack of the caller, and the stack pointer at *save. Then goes on
// with the fiber saved at `load`. It makes no system call. It cannot be inlined, as it returns on another stack.
extern "C" MONOSOFTMAX_HIDDEN void monosoftmax_cuda_host_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl monosoftmax_cuda_host_switch
.hidden monosoftmax_cuda_host_switch
.type monosoftmax_cuda_host_switch, @function
monosoftmax_cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size monosoftmax_cuda_host_switch, . - monosoftmax_cuda_host_switch
)");
#endif

namespace monosoftmax::cuda::host {
namespace {

void switch_stack(Fiber* from, Fiber* to) {
#ifdef MONOSOFTMAX_CUDA_HOST_USES_UCONTEXT
  swapcontext(&from->context, &to->context);
#else
  monosoftmax_cuda_host_switch(&from->stack_pointer, to->stack_pointer);
#endif
}

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

void prepare(Fiber* fiber, const Slots::Slot& slot, size_t stack_bytes, void (*main)()) {
  fiber->stack = slot.stack;
  fiber->stack_bytes = stack_bytes;
  fiber->sanitizer_thread = slot.sanitizer_thread;
  fiber->sanitizer_state = nullptr;
#ifdef MONOSOFTMAX_CUDA_HOST_USES_UCONTEXT
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = slot.stack;
  fiber->context.uc_stack.ss_size = stack_bytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, main, 0);
#else
  auto* top = reinterpret_cast<void**>(slot.stack + stack_bytes);
  *--top = nullptr;  // the return address of main()
  *--top = reinterpret_cast<void*>(main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber->stack_pointer = top;
#endif
}

void switch_fiber(Fiber* from, Fiber* to) {
  address::leave_stack(&from->sanitizer_state, to->stack, to->stack_bytes);
  threads::act_as(to->sanitizer_thread);
  switch_stack(from, to);
  address::enter_stack(from->sanitizer_state, nullptr, nullptr);
}

void end_fiber(Fiber* from, Fiber* to) {
  address::leave_stack(nullptr, to->stack, to->stack_bytes);
  threads::act_as(to->sanitizer_thread);
  switch_stack(from, to);
  std::abort();
}

void enter_fiber(Fiber* caller) {
  const void* stack = caller->stack;
  size_t bytes = caller->stack_bytes;
  const bool first = stack == nullptr;
  address::enter_stack(nullptr, first ? &stack : nullptr, first ? &bytes : nullptr);
  caller->stack = static_cast<char*>(const_cast<void*>(stack));
  caller->stack_bytes = bytes;
}

void Slots::provide(size_t count) {
  if (slots_.size() >= count) return;
  const size_t missing = count - slots_.size();
  const size_t stride = page_bytes() + kStackBytes;
  auto* memory = static_cast<char*>(map_memory(missing * stride));
  for (size_t i = 0; i < missing; ++i, memory += stride) {
    if (mprotect(memory, page_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
    slots_.push_back({memory + page_bytes(), threads::create()});
  }
}

void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

void unmap_memory(void* memory, size_t bytes) { munmap(memory, bytes); }

}  // namespace monosoftmax::cuda::host
