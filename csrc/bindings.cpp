// The Python module of the extension: how it was built, and a submodule of functions for each backend.
#include <torch/version.h>

#include "cpu/instruction_set.h"
#include "python_operators.h"
#ifdef MONOSOFTMAX_CUDA
#include "cuda/bindings.h"
#include "cuda/python_tuning.h"
#include "cuda/torch_device.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of monosoftmax; see monosoftmax.backends.";
  monosoftmax::translate_torch_errors();
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
#ifdef MONOSOFTMAX_CUDA
        info["cuda"] = MONOSOFTMAX_CUDA_TOOLKIT;
        info["cuda_architectures"] = MONOSOFTMAX_CUDA_ARCHITECTURES;
#else
        info["cuda"] = py::none();
        info["cuda_problem"] = MONOSOFTMAX_CUDA_PROBLEM;
#endif
        return info;
      },
      "Tells how the extension was built. cuda is the version of the toolkit that compiled its CUDA\n"
      "kernels for cuda_architectures; it is None where there are none, and cuda_problem says why.");
  module.def(
      "cpu_capability", [] { return monosoftmax::cpu::instruction_set().name; },
      "The instruction set whose kernels run on this machine: default, avx2 or avx512.");
  py::module_ cpu = module.def_submodule("cpu", "The functions of monosoftmax.row_kernels for CPU tensors.");
  monosoftmax::bind_row_operators(cpu, monosoftmax::cpu::kRowOperators);
  cpu.def("mean_scale", &monosoftmax::cpu::mean_scale, monosoftmax::WhileComputing(),
          "1 / (number of targets that are not ignore_index).", py::arg("target"), py::arg("ignore_index"),
          py::arg("dtype"));
#ifdef MONOSOFTMAX_CUDA
  monosoftmax::cuda::bind(module.def_submodule("cuda", "The functions of monosoftmax.row_kernels for CUDA tensors."));
  module.def(
      "tune_plans", [](const py::kwargs& wishes) { monosoftmax::cuda::tune(monosoftmax::cuda::tuning_of(wishes)); },
      "Tunes the plans of the CUDA kernels from now on, for benchmarks: csrc/cuda/plan.h, Tuning. What has no value\n"
      "here gets that which users have. No other thread may compute meanwhile.");
#endif
}
