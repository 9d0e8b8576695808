#include "shared_memory.h"

#include <algorithm>
#include <cstring>

#include "execution.h"
#include "fiber.h"
#include "sanitizers.h"

namespace monosoftmax::cuda::host {
namespace {

constexpr size_t kMemoryBytes = 512 << 10;  // of a block: the arrays and the gaps
constexpr size_t kMostArrays = 64;
constexpr size_t kMostAlignment = 128;
constexpr size_t kMostStaticBytes = 48 << 10;
// Bytes before, between and behind the arrays. The address sanitizer forbids access to them; the other builds detect
// writes to them.
constexpr size_t kGap = kBuild == Build::kAddress ? 1024 : 128;
static_assert(kMostSharedBytes + (kMostArrays + 1) * (kGap + 2 * kMostAlignment) + kGap <= kMemoryBytes);

constexpr unsigned char kFill = 0xff;

void fill(unsigned char* begin, size_t bytes) {
  if constexpr (kBuild == Build::kThread) {  // its memset would be an access of the running thread
    for (size_t i = 0; i < bytes; ++i) const_cast<volatile unsigned char*>(begin)[i] = kFill;
  } else {
    std::memset(begin, kFill, bytes);
  }
}

}  // namespace

size_t shared_limit = kMostSharedBytes;

void SharedMemory::begin(size_t blocks, size_t dynamic_bytes) {
  blocks_ = blocks;
  while (memory_.size() < blocks) {
    memory_.push_back(static_cast<unsigned char*>(map_memory(kMemoryBytes)));
    address::forbid(memory_.back(), kMemoryBytes);
  }
  zones_.reserve(kMostArrays);  // so that no thread of a block allocates
  used_ = static_bytes_ = 0;
  dynamic_ = place(nullptr, dynamic_bytes, 16);
}

// Places an array at an odd multiple of its alignment, so that it is not aligned further by chance.
SharedMemory::Zone SharedMemory::place(const SharedArray* array, size_t bytes, size_t alignment) {
  alignment = std::max<size_t>(alignment, 8);
  const size_t offset = (used_ + kGap + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
  for (size_t block = 0; block < blocks_; ++block) {
    unsigned char* memory = memory_[block];
    if constexpr (kBuild == Build::kAddress) {
      address::allow(memory + offset, bytes);
      fill(memory + offset, bytes);
    } else {
      fill(memory + used_, offset + bytes + kGap - used_);
    }
  }
  used_ = offset + bytes;
  return {array, offset, bytes};
}

void SharedMemory::end() {
  for (size_t block = 0; block < blocks_; ++block) {
    const Zone* before = nullptr;
    const auto check_until = [&](const Zone* zone) {
      check_gap(block, before, zone);
      before = zone;
    };
    check_until(&dynamic_);
    for (const Zone& zone : zones_) check_until(&zone);
    check_until(nullptr);
    address::forbid(memory_[block], used_);
  }
  zones_.clear();
  if constexpr (kBuild == Build::kThread) {  // so that the sanitizer forgets the accesses to it
    for (unsigned char* memory : memory_) unmap_memory(memory, kMemoryBytes);
    memory_.clear();
  }
}

// Checks the gap between two neighbours; the first or the last may be missing. The array nearer to the written bytes is
// to blame.
void SharedMemory::check_gap(size_t block, const Zone* before, const Zone* after) const {
  if constexpr (kBuild == Build::kAddress) return;
  const unsigned char* begin = memory_[block] + (before == nullptr ? 0 : before->offset + before->bytes);
  const unsigned char* end = memory_[block] + (after == nullptr ? used_ + kGap : after->offset);
  const auto is_written = [](unsigned char byte) { return byte != kFill; };
  const unsigned char* first = std::find_if(begin, end, is_written);
  if (first == end) return;
  const unsigned char* last = end - 1;
  while (!is_written(*last)) --last;
  const auto behind = first - begin, ahead = end - last;
  const bool is_behind = before != nullptr && (after == nullptr || behind < ahead);
  const SharedArray* array = is_behind ? before->array : after->array;
  const uint3& index = execution.blocks[block].index;
  report_defect(array == nullptr ? nullptr : array->file, array == nullptr ? 0 : array->line,
                "block (%u,%u,%u) wrote shared memory out of bounds, %td bytes %s %s", index.x, index.y, index.z,
                is_behind ? behind : ahead, is_behind ? "behind the end of" : "before",
                array == nullptr ? "the dynamic part" : array->name);
}

void* SharedMemory::array(const SharedArray& array, size_t block) {
  auto zone = std::find_if(zones_.begin(), zones_.end(), [&](const Zone& zone) { return zone.array == &array; });
  if (zone == zones_.end()) {
    if (zones_.size() == kMostArrays) {
      report_defect(array.file, array.line, "more than %zu shared arrays", kMostArrays);
    }
    if (array.alignment > kMostAlignment) {
      report_defect(array.file, array.line, "%s is aligned to %zu bytes, at most %zu", array.name, array.alignment,
                    kMostAlignment);
    }
    static_bytes_ += array.bytes;
    if (static_bytes_ > kMostStaticBytes) {
      report_defect(array.file, array.line, "with %s the kernel has %zu bytes of static shared memory, at most %zu",
                    array.name, static_bytes_, kMostStaticBytes);
    }
    if (static_bytes_ + dynamic_.bytes > shared_limit) {
      report_defect(array.file, array.line,
                    "with %s the kernel has %zu bytes of static and %zu of dynamic shared memory, together at most %zu",
                    array.name, static_bytes_, dynamic_.bytes, shared_limit);
    }
    zone = zones_.insert(zones_.end(), place(&array, array.bytes, array.alignment));
  }
  return memory_[block] + zone->offset;
}

bool SharedMemory::contains(size_t block, const void* address) const {
  const auto* byte = static_cast<const unsigned char*>(address);
  return memory_[block] <= byte && byte < memory_[block] + kMemoryBytes;
}

void* SharedMemory::in_other_block(void* mine, size_t block, size_t other) const {
  return memory_[other] + (static_cast<unsigned char*>(mine) - memory_[block]);
}

void SharedMemory::forbid(size_t block) const {
  if constexpr (kBuild == Build::kAddress) {
    address::forbid(memory_[block], used_);
  } else {
    fill(memory_[block] + dynamic_.offset, dynamic_.bytes);
    for (const Zone& zone : zones_) fill(memory_[block] + zone.offset, zone.bytes);
  }
}

void* shared_array(const SharedArray& array) { return execution.shared.array(array, self().in_block->rank); }
unsigned char* dynamic_shared() { return execution.shared.dynamic(self().in_block->rank); }

}  // namespace monosoftmax::cuda::host
