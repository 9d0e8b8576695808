// The host build reports seeded defects, and nothing else: each case runs in a process of its own, in every order of
// blocks and threads. With the number of a case and of an order as arguments, the program is that process.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "clean_kernels.h"
#include "defects_of_meeting.h"
#include "defects_of_memory.h"
#include "defects_of_order.h"
#include "orders.h"

namespace monosoftmax::test {
namespace {

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const auto* some : {&kDefectsOfMemory, &kDefectsOfOrder, &kDefectsOfMeeting, &kCleanKernels}) {
    cases.insert(cases.end(), some->begin(), some->end());
  }
  return cases;
}

const char* expected_of(const Case& one) {
  switch (cuda::host::kBuild) {
    case Build::kPlain: return one.plain;
    case Build::kAddress: return one.address;
    case Build::kThread: return one.thread;
  }
  return kUnseen;
}

struct Outcome {
  int exit_code;  // -1 for a signal
  std::string output;
};

Outcome run_in_process(const std::string& program, size_t number, size_t order) {
  const std::string command = "'" + program + "' " + std::to_string(number) + " " + std::to_string(order) + " 2>&1";
  Outcome outcome{-1, ""};
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return outcome;
  char part[4096];
  for (size_t bytes; (bytes = std::fread(part, 1, sizeof part, pipe)) > 0;) outcome.output.append(part, bytes);
  const int status = pclose(pipe);
  // What the address sanitizer says of ucontext, by which fibers switch on processors other than x86-64.
  const size_t remark = outcome.output.find("WARNING: ASan doesn't fully support makecontext/swapcontext");
  if (remark != std::string::npos) {
    const size_t begin = outcome.output.rfind('\n', remark) + 1;  // of the line; 0 if it is the first one
    outcome.output.erase(begin, outcome.output.find('\n', remark) + 1 - begin);
  }
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  return outcome;
}

// What is wrong with it, or an empty string.
std::string fault_of(const Case& one, const Outcome& outcome) {
  const std::string expected = expected_of(one);
  if (expected.empty()) {
    if (outcome.exit_code != 0 || !outcome.output.empty()) return "a clean kernel is reported";
    return "";
  }
  if (outcome.exit_code <= 0 || outcome.exit_code > 128) {
    return "ended with " + std::to_string(outcome.exit_code) + ", rather than an error code";
  }
  const bool is_ours = outcome.output.find("monosoftmax: defect in a CUDA kernel: ") != std::string::npos;
  if (is_ours && outcome.exit_code != cuda::host::kDefectExitCode) {
    return "ended with " + std::to_string(outcome.exit_code);
  }
  if (outcome.output.find(expected) == std::string::npos) return "no report of: " + expected;
  // A report leads to the kernel: by its name in a call stack, else by the file that it stands in. Dynamic shared
  // memory is of the launch, not of a place in a file.
  const auto expects = [&](const char* part) { return expected.find(part) != std::string::npos; };
  const std::string place = expects("Sanitizer") ? one.kernel : "tests/cuda/defects_of_";
  if (!expects(kNaN) && !expects("the dynamic part") && outcome.output.find(place) == std::string::npos) {
    return "the report does not name " + place;
  }
  if (expected == kRace && outcome.output.find("'block (") == std::string::npos) {
    return "the report does not name the threads";
  }
  return "";
}

int check_all() {
  char program[4096];
  const ssize_t length = readlink("/proc/self/exe", program, sizeof program);
  if (length <= 0) return 1;
  int failures = 0, processes = 0;
  const auto cases = all_cases();
  for (size_t i = 0; i < cases.size(); ++i) {
    if (expected_of(cases[i]) == kUnseen) continue;
    for (size_t order = 0; order < std::size(kOrders); ++order, ++processes) {
      const Outcome outcome = run_in_process({program, static_cast<size_t>(length)}, i, order);
      const std::string fault = fault_of(cases[i], outcome);
      if (fault.empty()) continue;
      ++failures;
      std::fprintf(stderr, "failed: %s, %s: %s\n%s\n", cases[i].kernel, kOrderNames[order], fault.c_str(),
                   outcome.output.c_str());
    }
  }
  std::printf("%d failures in %d processes\n", failures, processes);
  return failures != 0;
}

}  // namespace
}  // namespace monosoftmax::test

int main(int count, char** arguments) {
  using namespace monosoftmax::test;
  if (count != 3) return check_all();
  const auto order = static_cast<size_t>(std::atoi(arguments[2]));
  monosoftmax::cuda::host::set_order(kOrders[order], 7);
  all_cases().at(static_cast<size_t>(std::atoi(arguments[1]))).run();
}
