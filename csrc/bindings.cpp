// The Python face of the extension: what it is. The operators reach Python through torch.ops.monosoftmax.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/instruction_set.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of monosoftmax; see monosoftmax.backends.";
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] = __VERSION__;
#ifdef _OPENMP
        info["openmp"] = true;
#else
        info["openmp"] = false;
#endif
        return info;
      },
      "What the extension was built against and with.");
  module.def(
      "cpu_capability", [] { return monosoftmax::cpu::instruction_set().name; },
      "The instruction set whose kernels run on this machine: default, avx2 or avx512.");
}
