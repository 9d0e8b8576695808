// Plans, for the code generation report: of each line of standard input, which asks for one, a line of standard output.
//
//   in   transform size rows classes element_bytes losses gradient coefficients weighted_smoothing deterministic
//        capability multiprocessors shared_memory shared_memory_multiprocessor
//   out  rows sums table_in_shared_memory atomic blocks cluster threads shared_bytes
#include <iostream>
#include <sstream>
#include <string>

#include "cuda/plan.h"

int main() {
  using namespace monosoftmax::cuda;
  constexpr const char* kRowsNames[] = {"once", "resident", "reread"};
  constexpr const char* kSumsNames[] = {"none", "vector", "lanes", "warps"};
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    std::string transform;
    PlanRequest request{};
    Device device{};
    in >> transform >> request.size >> request.rows >> request.classes >> request.element_bytes >> request.losses >>
        request.gradient >> request.coefficients >> request.weighted_smoothing >> request.deterministic >>
        device.capability >> device.multiprocessors >> device.shared_memory >> device.shared_memory_multiprocessor;
    if (!in) {
      std::cerr << "not a request: " << line << '\n';
      return 1;
    }
    request.transform = transform;
    const Plan plan = make_plan(request, device);
    std::cout << kRowsNames[static_cast<int>(plan.rows)] << ' ' << kSumsNames[static_cast<int>(plan.sums)] << ' '
              << plan.table_in_shared_memory << ' ' << plan.atomic << ' ' << plan.blocks << ' ' << plan.cluster << ' '
              << plan.threads << ' ' << plan.shared_bytes << '\n';
  }
}
