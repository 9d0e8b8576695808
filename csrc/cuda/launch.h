// The launchers: plain C++, for the operators (operators.cpp), for C++ programs without torch, and for the tests. They
// return once the kernel is in the stream. If the launch fails, they throw std::runtime_error with CUDA's message.
#pragma once

#include <string_view>

#include "arguments.h"
#include "plan.h"

namespace monosoftmax::cuda {

// A cudaStream_t, on the current device.
using Stream = void*;

// Computes losses, gradients and sums, as the arguments ask. The plan must be made for these arguments.
void launch_cross_entropy(const Plan& plan, std::string_view transform, ElementType element,
                          const CrossEntropyArguments& arguments, Stream stream);

// log p, its gradients, the statistics of each token, and the losses for targets of all classes. These launchers use
// the threads and blocks of the plan. Their kernels keep no row on chip, but read it again.
void launch_log_softmax(const Plan& plan, std::string_view transform, ElementType element,
                        const LogSoftmaxArguments& arguments, Stream stream);
void launch_log_softmax_backward(const Plan& plan, std::string_view transform, ElementType element,
                                 const LogSoftmaxBackwardArguments& arguments, Stream stream);
void launch_token_statistics(const Plan& plan, std::string_view transform, ElementType element,
                             const TokenStatisticsArguments& arguments, Stream stream);
void launch_dense_target(const Plan& plan, std::string_view transform, ElementType element,
                         const DenseTargetArguments& arguments, Stream stream);

// The size, in numbers, of the table for look-ups in global memory (TransformArguments::table). It is 0 for a transform
// without a table.
int64_t table_numbers(std::string_view transform, int64_t size);
// Fills this table.
void launch_fill_table(std::string_view transform, const TransformArguments& arguments, float* table, Stream stream);

// The coefficients of a PLIF of up to 2^22 pieces, and the gradient of its raw slopes.
void launch_plif_coefficients(const PlifArguments& arguments, Stream stream);
void launch_plif_coefficients_backward(const PlifArguments& arguments, Stream stream);

// x *= factor, for contiguous numbers. The kernel does nothing if the factor is 1, which only the device knows.
void launch_scale(void* x, ElementType element, int64_t count, const float* factor, int multiprocessors, Stream stream);

}  // namespace monosoftmax::cuda
