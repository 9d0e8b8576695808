// The functions of the cuda backend for Python: monosoftmax._C.cuda, and the host execution for CPU tensors.
#pragma once

#include "../python_operators.h"

namespace monosoftmax::cuda {

inline void bind(pybind11::module_ module) {
  namespace py = pybind11;
  bind_row_operators(module, kRowOperators);
  module.def("scale_", &scale_, WhileComputing(), py::arg("tensor"), py::arg("factor"));
  module.def("describe_plan", &describe_plan, py::arg("rows"), py::arg("transform_name"), py::arg("size"),
             py::arg("gradient"), py::arg("coefficients"));
}

}  // namespace monosoftmax::cuda
