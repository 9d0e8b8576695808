// The host execution for tests. Its submodule cuda has the functions of monosoftmax._C.cuda, for CPU tensors. Only
// tests/cuda_host.py builds and uses it.
#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "../python_tuning.h"
#include "device_settings.h"
#include "launch.h"

namespace py = pybind11;

namespace monosoftmax::cuda::host {
namespace {

void set_order_by_name(const std::string& order, unsigned seed) {
  if (order == "forward") {
    set_order(Order::kForward, seed);
  } else if (order == "reverse") {
    set_order(Order::kReverse, seed);
  } else if (order == "random") {
    set_order(Order::kRandom, seed);
  } else {
    throw std::invalid_argument("order must be forward, reverse or random, got " + order);
  }
}

}  // namespace
}  // namespace monosoftmax::cuda::host

PYBIND11_MODULE(monosoftmax_cuda_host, module) {
  namespace host = monosoftmax::cuda::host;
  monosoftmax::translate_torch_errors();
  monosoftmax::cuda::bind(module.def_submodule("cuda"));
  module.def(
      "set_device",
      [](int capability, int multiprocessors, int64_t shared_memory, const py::kwargs& tuning) {
        host::device() = {capability, multiprocessors, shared_memory, shared_memory + 1024,
                          monosoftmax::cuda::tuning_of(tuning)};
        host::set_shared_limit(shared_memory);
      },
      "The GPU to be taken for, and what its plans are tuned to.", py::arg("capability"), py::arg("multiprocessors"),
      py::arg("shared_memory"));
  module.def(
      "plan",
      [](const std::string& transform, int64_t size, int64_t rows, int64_t classes, int element_bytes, bool losses,
         bool gradient, bool coefficients, bool weighted_smoothing, bool deterministic) {
        namespace cuda = monosoftmax::cuda;
        const auto plan = cuda::make_plan({transform, size, rows, classes, element_bytes, losses, gradient,
                                           coefficients, weighted_smoothing, deterministic},
                                          host::device());
        py::dict result;
        result["rows"] = plan.rows == cuda::Rows::kOnce       ? "once"
                         : plan.rows == cuda::Rows::kResident ? "resident"
                                                              : "reread";
        result["sums"] = plan.sums == cuda::SumsKind::kNone     ? "none"
                         : plan.sums == cuda::SumsKind::kVector ? "vector"
                         : plan.sums == cuda::SumsKind::kLanes  ? "lanes"
                                                                : "warps";
        result["table_in_shared_memory"] = plan.table_in_shared_memory;
        result["atomic"] = plan.atomic;
        result["blocks"] = plan.blocks;
        result["cluster"] = plan.cluster;
        result["threads"] = plan.threads;
        result["sum_sets"] = plan.sum_sets;
        result["shared_bytes"] = plan.shared_bytes;
        return result;
      },
      "The plan of a call on that GPU.", py::arg("transform"), py::arg("size"), py::kw_only(), py::arg("rows"),
      py::arg("classes"), py::arg("element_bytes") = 2, py::arg("losses") = true, py::arg("gradient") = true,
      py::arg("coefficients") = true, py::arg("weighted_smoothing") = false, py::arg("deterministic") = false);
  module.def("set_order", &host::set_order_by_name, "The order in which threads take turns.", py::arg("order"),
             py::arg("seed") = 1);
  module.def(
      "traffic", [] { return py::make_tuple(host::traffic().bytes_read, host::traffic().bytes_written); },
      "Bytes of rows that kernels have read and written since the last reset.");
  module.def("reset_traffic", &host::reset_traffic);
  module.def(
      "matches", [] { return py::make_tuple(host::match_statistics().calls, host::match_statistics().groups); },
      "Lanes that have matched values since the last reset, and the groups that they were found to be.");
  module.def("reset_matches", &host::reset_match_statistics);
}
