// Reports of defects.
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "execution.h"

#ifdef MONOSOFTMAX_CUDA_HOST_THREAD
// By default the sanitizer waits a second before the process ends, for threads of the system that might still race.
extern "C" const char* __tsan_default_options() { return "atexit_sleep_ms=0"; }
#endif

namespace monosoftmax::cuda::host {
namespace {

[[noreturn]] void print_and_exit(const Thread* thread, const char* file, unsigned line, const char* format,
                                 va_list arguments) {
  std::fflush(stdout);
  std::fputs("monosoftmax: defect in a CUDA kernel: ", stderr);
  std::vfprintf(stderr, format, arguments);
  if (thread != nullptr) std::fprintf(stderr, "\n  %s", name_of(*thread).c_str());
  if (file != nullptr && line != 0) std::fprintf(stderr, "\n  at %s:%u", file, line);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::_Exit(kDefectExitCode);
}

const char* doing(const Thread& thread) {
  if (thread.ended) return "has exited";
  switch (thread.wait) {
    case Wait::kWarp: return "is at a warp collective";
    case Wait::kBlock: return "is at a barrier of the block";
    case Wait::kCluster: return "is at a barrier of the cluster";
    case Wait::kNothing: return "runs";
  }
  __builtin_unreachable();
}

void explain_warp(const Warp& warp) {
  for (unsigned left = warp.at_collective; left != 0; left &= left - 1) {
    const Thread& thread = warp.threads[std::countr_zero(left)];
    for (unsigned mask = thread.mask; mask != 0; mask &= mask - 1) {
      const Thread& other = warp.threads[std::countr_zero(mask)];
      if (other.ended) {
        report_defect_of(thread, "warp collective: lane %u in mask 0x%08x has exited", other.lane, thread.mask);
      }
      if (other.wait != Wait::kWarp || other.mask != thread.mask || other.collective != thread.collective ||
          !same_place(other.where, thread.where)) {
        if (other.wait == Wait::kWarp && other.mask != thread.mask && same_place(other.where, thread.where)) {
          report_defect_of(thread, "warp collective: lane %u has mask 0x%08x, lane %u, which is in it, has 0x%08x",
                           thread.lane, thread.mask, other.lane, other.mask);
        }
        report_defect_of(thread,
                         "warp collective: the lanes in mask 0x%08x are at different places: lane %u %s at %s:%u",
                         thread.mask, other.lane, doing(other), other.where.file_name(), other.where.line());
      }
    }
  }
}

void explain_barrier(const Thread& thread, const Thread* threads, unsigned count, Wait wait, const char* name) {
  for (unsigned i = 0; i < count; ++i) {
    const Thread& other = threads[i];
    if (other.ended) {
      report_defect_of(thread, "%s reached by some threads after others have exited, such as thread %u of block %u",
                       name, i % other.in_block->thread_count, other.block.x);
    }
    if (other.wait != wait) {
      report_defect_of(thread, "barrier divergence: some threads wait in %s, another one %s at %s:%u", name,
                       doing(other), other.where.file_name(), other.where.line());
    }
  }
}

}  // namespace

std::string name_of(const Thread& thread) {
  const auto written = [](const uint3& index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
  };
  return "block " + written(thread.block) + " thread " + written(thread.ThreadIndices::thread);
}

void report_defect(const char* file, unsigned line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_and_exit(nullptr, file, line, format, arguments);
}

void report_defect_of(const Thread& thread, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_and_exit(&thread, thread.where.file_name(), thread.where.line(), format, arguments);
}

bool same_place(const Location& a, const Location& b) {
  // Usually both point to the same description.
  if (std::memcmp(&a, &b, sizeof(Location)) == 0) return true;
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

void explain_standstill() {
  const Execution& e = execution;
  for (unsigned w = 0; w < e.warp_count; ++w) explain_warp(e.warps[w]);
  for (unsigned i = 0; i < e.thread_count; ++i) {
    const Thread& thread = e.threads[i];
    if (thread.ended) continue;
    const Block& block = *thread.in_block;
    if (thread.wait == Wait::kBlock) {
      explain_barrier(thread, block.threads, block.thread_count, Wait::kBlock, "__syncthreads()");
    }
  }
  for (unsigned i = 0; i < e.thread_count; ++i) {
    const Thread& thread = e.threads[i];
    if (!thread.ended && thread.wait == Wait::kCluster) {
      explain_barrier(thread, e.threads.data(), e.thread_count, Wait::kCluster, "Cluster::sync()");
    }
  }
  report_defect(nullptr, 0, "no thread can go on");
}

void* fresh_meeting_point() {
  // Used-up memory is unmapped. New memory in the same place is new to the thread sanitizer, too. And the sanitizer
  // keeps up to 16 KiB for each meeting until the memory is unmapped.
  constexpr size_t kBytes = 1 << 16, kDistance = 16;
  static char* memory = nullptr;
  static size_t used = kBytes;
  if (used == kBytes) {
    const ActAsHost host;
    if (memory != nullptr) unmap_memory(memory, kBytes);
    memory = static_cast<char*>(map_memory(kBytes));
    used = 0;
  }
  used += kDistance;
  return memory + used - kDistance;
}

}  // namespace monosoftmax::cuda::host
