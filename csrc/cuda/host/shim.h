// CUDA C++ for a compiler without CUDA: platform.h includes it instead of CUDA's headers. The kernels run on the CPU,
// one fiber for each CUDA thread, and behaviour that is undefined on a GPU is reported. There are three builds: plain,
// with the address and undefined-behaviour sanitizers, and with the thread sanitizer, which finds the races.
//
// Not modelled: grid-wide barriers and blocks that wait for each other's results; the order of memory by atomic
// operations and fences, which are taken as relaxed; tensor cores; speed.
#pragma once

#include <cmath>
#include <memory>  // before the macro __noinline__, since it uses an attribute of that name

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define MONOSOFTMAX_UNROLL
#define MONOSOFTMAX_NO_UNROLL

#include "arithmetic.h"
#include "half_types.h"
#include "launch.h"
#include "memory.h"
#include "vector_types.h"
#include "warp.h"
