#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace monosoftmax::cpu {
namespace {

// The instruction sets of this processor, best first.
std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
#ifdef MONOSOFTMAX_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) sets.push_back(&kAvx512);
  if (avx2) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kDefault);
  return sets;
}

const InstructionSet& choose() {
  const auto sets = supported();
  const char* asked = std::getenv("MONOSOFTMAX_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return *sets.front();
  std::string names;
  for (const InstructionSet* set : sets) {
    if (asked == std::string_view(set->name)) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::runtime_error("MONOSOFTMAX_CPU_CAPABILITY must be one of " + names + " on this processor, got " + asked);
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace monosoftmax::cpu
