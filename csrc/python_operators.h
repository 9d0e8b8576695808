// Gives the functions of a backend to Python.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/Exceptions.h>

#include "python_groups.h"
#include "row_operators.h"

namespace monosoftmax {

// While a function computes, other Python threads may run, and torch records no operator that the function calls.
using WhileComputing = pybind11::call_guard<pybind11::gil_scoped_release, at::AutoDispatchBelowADInplaceOrView>;

// Turns errors of torch's checks into torch's Python exceptions, for all functions of this extension module.
inline void translate_torch_errors() {
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(error);
    }
  });
}

inline void bind_row_operators(pybind11::module_& module, const RowOperators& operators) {
  namespace py = pybind11;
  module.def("cross_entropy", operators.cross_entropy, WhileComputing(), py::arg("rows"), py::arg("target"),
             py::arg("transform"), py::arg("options"), py::arg("upstream") = py::none(),
             py::arg("row_stats") = py::none(), py::arg("output_mask") = std::make_pair(false, false),
             py::arg("grad_rows") = py::none());
  module.def("token_statistics", operators.token_statistics, WhileComputing(), py::arg("rows"), py::arg("target"),
             py::arg("transform"), py::arg("ignore_index"));
  module.def("divergence", operators.divergence, WhileComputing(), py::arg("rows"), py::arg("log_target"),
             py::arg("transform"), py::arg("divergence"), py::arg("upstream") = py::none(),
             py::arg("row_stats") = py::none(), py::arg("output_mask") = std::make_pair(false, false),
             py::arg("grad_rows") = py::none());
  module.def("log_softmax", operators.log_softmax, WhileComputing(), py::arg("rows"), py::arg("transform"),
             py::arg("dtype"), py::arg("out") = py::none());
  module.def("log_softmax_backward", operators.log_softmax_backward, WhileComputing(), py::arg("grad_output"),
             py::arg("rows"), py::arg("transform"), py::arg("row_stats"), py::arg("output_mask"));
  module.def("plif_coefficients", operators.plif_coefficients, WhileComputing(), py::arg("raw_slope"), py::arg("bound"),
             py::arg("min_slope"));
  module.def("plif_coefficients_backward", operators.plif_coefficients_backward, WhileComputing(),
             py::arg("grad_coefficients"), py::arg("raw_slope"), py::arg("bound"), py::arg("min_slope"));
}

}  // namespace monosoftmax
