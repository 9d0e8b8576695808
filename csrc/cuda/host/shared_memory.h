// The shared memory of the running blocks. Each block has one piece of memory, and the same arrays at equal offsets.
#pragma once

#include <cstddef>
#include <vector>

#include "runtime.h"

namespace monosoftmax::cuda::host {

class SharedMemory {
 public:
  // Begins with this many blocks. Arrays are filled with 0xff, which is NaN as floats.
  void begin(size_t blocks, size_t dynamic_bytes);
  // To be called after the last thread of the last block.
  void end();

  unsigned char* dynamic(size_t block) const { return memory_[block] + dynamic_.offset; }
  // The array of this block. All blocks get the array when the first thread asks for it.
  void* array(const SharedArray& array, size_t block);
  bool contains(size_t block, const void* address) const;
  void* in_other_block(void* mine, size_t block, size_t other) const;
  // The block has ended and its shared memory is gone. Other blocks of its cluster keep theirs.
  void forbid(size_t block) const;

 private:
  struct Zone {
    const SharedArray* array;  // null for the dynamic memory
    size_t offset, bytes;
  };
  Zone place(const SharedArray* array, size_t bytes, size_t alignment);
  void check_gap(size_t block, const Zone* before, const Zone* after) const;

  std::vector<unsigned char*> memory_;  // of each block
  size_t blocks_ = 0;
  Zone dynamic_{};
  std::vector<Zone> zones_;  // static
  size_t used_ = 0, static_bytes_ = 0;
};

inline constexpr size_t kMostSharedBytes = 227 << 10;
MONOSOFTMAX_HIDDEN extern size_t shared_limit;

}  // namespace monosoftmax::cuda::host
