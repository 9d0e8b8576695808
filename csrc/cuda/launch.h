// The launchers: plain C++, for the operators (operators.cpp), for C++ programs without torch, and for the tests.
// They return when the kernel is in the stream, and throw std::runtime_error with CUDA's words where it cannot be.
#pragma once

#include <string_view>

#include "arguments.h"
#include "plan.h"

namespace monosoftmax::cuda {

// A cudaStream_t, on the current device.
using Stream = void*;

// The losses, gradients and sums that the arguments ask for, by the plan that was made for them.
void launch_cross_entropy(const Plan& plan, std::string_view transform, ElementType element,
                          const CrossEntropyArguments& arguments, Stream stream);

// log p, its gradients, and the statistics of each token. These take the threads and blocks of the plan, and read rows
// again.
void launch_log_softmax(const Plan& plan, std::string_view transform, ElementType element,
                        const LogSoftmaxArguments& arguments, Stream stream);
void launch_log_softmax_backward(const Plan& plan, std::string_view transform, ElementType element,
                                 const LogSoftmaxBackwardArguments& arguments, Stream stream);
void launch_token_statistics(const Plan& plan, std::string_view transform, ElementType element,
                             const TokenStatisticsArguments& arguments, Stream stream);

// How many numbers the table for look-ups in global memory has (TransformArguments::table); 0 for a transform without
// one.
int64_t table_numbers(std::string_view transform, int64_t size);
// Fills it.
void launch_fill_table(std::string_view transform, const TransformArguments& arguments, float* table, Stream stream);

// The coefficients of a PLIF of up to 2^22 pieces, and the gradient of its raw slopes.
void launch_plif_coefficients(const PlifArguments& arguments, Stream stream);
void launch_plif_coefficients_backward(const PlifArguments& arguments, Stream stream);

// x *= factor, for numbers next to each other: nothing where the factor is 1, which only the device knows.
void launch_scale(void* x, ElementType element, int64_t count, const float* factor, int multiprocessors, Stream stream);

}  // namespace monosoftmax::cuda
