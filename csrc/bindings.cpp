// The Python face of the extension: what it is. The operators reach Python through torch.ops.monosoftmax.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/instruction_set.h"
#ifdef MONOSOFTMAX_CUDA
#include "cuda/python_tuning.h"
#include "cuda/torch_device.h"
#endif

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
#ifdef MONOSOFTMAX_CUDA
        info["cuda"] = MONOSOFTMAX_CUDA_TOOLKIT;
        info["cuda_architectures"] = MONOSOFTMAX_CUDA_ARCHITECTURES;
#else
        info["cuda"] = py::none();
        info["cuda_problem"] = MONOSOFTMAX_CUDA_PROBLEM;
#endif
        return info;
      },
      "What the extension was built against and with. cuda is the version of the toolkit that compiled its CUDA\n"
      "kernels for cuda_architectures; it is None where there are none, and cuda_problem says why.");
  module.def(
      "cpu_capability", [] { return monosoftmax::cpu::instruction_set().name; },
      "The instruction set whose kernels run on this machine: default, avx2 or avx512.");
#ifdef MONOSOFTMAX_CUDA
  module.def(
      "tune_plans", [](const py::kwargs& wishes) { monosoftmax::cuda::tune(monosoftmax::cuda::tuning_of(wishes)); },
      "Plans of the CUDA kernels from now on, for benchmarks: csrc/cuda/plan.h, Tuning. What is not named is as it is\n"
      "for users. No other thread may compute meanwhile.");
#endif
}
