// The asynchronous copies of a thread, from their issue until the thread waits for them.
#include "execution.h"

namespace monosoftmax::cuda::host {
namespace {

template <class T>
void append(std::vector<T>* to, const T& value) {
  if (to->size() < to->capacity()) return to->push_back(value);
  const ActAsHost host;
  to->push_back(value);
}

}  // namespace

void issue_copy(const AsyncCopy& copy, Location where) {
  Thread& thread = self();
  thread.where = where;
  if (copy.bytes != 4 && copy.bytes != 8 && copy.bytes != 16) {
    report_defect_of(thread, "asynchronous copy of %u bytes, rather than 4, 8 or 16", copy.bytes);
  }
  if (copy.zeros > copy.bytes) {
    report_defect_of(thread, "asynchronous copy of %u bytes, of which %u are zeros", copy.bytes, copy.zeros);
  }
  if (reinterpret_cast<uintptr_t>(copy.to) % copy.bytes != 0) {
    report_defect_of(thread, "asynchronous copy of %u bytes to a misaligned address", copy.bytes);
  }
  if (reinterpret_cast<uintptr_t>(copy.from) % copy.bytes != 0) {
    report_defect_of(thread, "asynchronous copy of %u bytes from a misaligned address", copy.bytes);
  }
  if (!execution.shared.contains(thread.in_block->rank, copy.to)) {
    report_defect_of(thread, "asynchronous copy to an address that is not in the shared memory of this block");
  }
  if (execution.shared.contains(thread.in_block->rank, copy.from)) {
    report_defect_of(thread, "asynchronous copy from shared memory");
  }
  append(&thread.copies, copy);
}

void commit_copies() { append(&self().copy_groups, self().copies.size()); }

bool next_due_copy(size_t groups_left, AsyncCopy* copy) {
  Thread& thread = self();
  if (thread.copy_groups.size() <= groups_left) return false;
  const size_t groups = thread.copy_groups.size() - groups_left;
  const size_t due = thread.copy_groups[groups - 1];
  if (thread.copies_done < due) {
    *copy = thread.copies[thread.copies_done++];
    return true;
  }
  const ActAsHost host;  // the vectors outlive this thread
  const auto begin = [](auto& v, size_t n) { return v.begin() + static_cast<ptrdiff_t>(n); };
  thread.copies.erase(thread.copies.begin(), begin(thread.copies, due));
  thread.copy_groups.erase(thread.copy_groups.begin(), begin(thread.copy_groups, groups));
  for (size_t& end : thread.copy_groups) end -= due;
  thread.copies_done = 0;
  return false;
}

}  // namespace monosoftmax::cuda::host
