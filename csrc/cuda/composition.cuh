// f with what stands before and after it: y = f(inner(z)) / temperature.
//
// Both are arguments of the kernels, and no kernel is compiled twice for them. Without inner, a chunk of logits costs
// one branch, which all threads take alike. The temperature costs a logit nothing: kernels work with f, not with y, and
// form e^(y - largest y) as 2^(f unit - shift), where unit = log2(e) / temperature is in a register, as log2(e) would
// be in the instruction. Their backward pass differentiates with respect to f, and divides the upstream gradients of a
// row by the temperature.
//
// Numerics: unit is rounded once for all logits, so that y - largest has a relative error of 6e-8, without
// cancellation. A temperature that is not positive makes unit NaN, and with it every result of a row. The largest f
// belongs to the largest logit, and to the largest y.
#pragma once

#include "../transforms/inner.h"
#include "arguments.h"
#include "memory.cuh"

namespace monosoftmax::cuda {

template <class F>
class Composed {
 public:
  // inner(z) of a logit z, and inner'(z).
  struct Argument {
    float value, slope;
  };

  __device__ __forceinline__ Composed(const F& f, const TransformArguments& arguments)
      : function(f), unit(unit_of(arguments)), inner_(arguments.inner), temperature_(arguments.temperature) {}

  // The logits of a chunk, as f takes them.
  template <class E>
  __device__ __forceinline__ void unpack(const Chunk<E>& chunk, float (&arguments)[Chunk<E>::kElements]) const {
    chunk.unpack(arguments);
    if (!inner_.present) return;
    MONOSOFTMAX_NO_UNROLL for (int i = 0; i < Chunk<E>::kElements; i += 2) {
      const auto values = inner<2>().value(first_two(arguments));
      rotate(arguments, values.of[0], values.of[1]);
    }
  }
  // Makes gradients of a chunk of logits out of those of f's arguments, with inner'(z) of the chunk that again() reads.
  // Registers hold neither inner'(z) nor the chunk meanwhile.
  template <class Again, int kElements>
  __device__ __forceinline__ void chain(float (&gradients)[kElements], Again&& again) const {
    if (!inner_.present) return;
    float logits[kElements];
    again().unpack(logits);
    MONOSOFTMAX_NO_UNROLL for (int i = 0; i < kElements; i += 2) {
      const auto slopes = inner<2>().at(first_two(logits)).derivative;
      rotate(gradients, gradients[0] * slopes.of[0], gradients[1] * slopes.of[1]);
      rotate(logits, 0, 0);
    }
  }
  // The same for a single logit.
  __device__ __forceinline__ Argument argument(float logit) const {
    if (!inner_.present) return {logit, 1};
    const auto point = inner<1>().at(Float(logit));
    return {point.value.of[0], point.derivative.of[0]};
  }
  // f of a single logit.
  template <class T>
  __device__ __forceinline__ float of_logit(float logit) const {
    return function.value(T(argument(logit).value)).of[0];
  }

  // log2 e^(y - largest y), from the shift for the largest y.
  static __device__ __forceinline__ float shift_of(float largest) { return largest * kLog2E; }
  __device__ __forceinline__ float gap(float value, float shift) const { return __fmaf_rn(value, unit, -shift); }
  template <class T>
  __device__ __forceinline__ T exponential(T value, float shift) const {
    return each<float>(value, [&](float x) { return exp2_approximate(gap(x, shift)); });
  }

  __device__ __forceinline__ bool has_temperature() const { return temperature_ != nullptr; }
  // Read again for each row: no register holds it meanwhile.
  __device__ __forceinline__ float inverse_temperature() const {
    return temperature_ == nullptr ? 1 : 1 / *temperature_;
  }

  const F function;
  const float unit;

 private:
  static __device__ __forceinline__ float unit_of(const TransformArguments& arguments) {
    if (arguments.temperature == nullptr) return kLog2E;
    const float temperature = *arguments.temperature;
    return temperature > 0 ? kLog2E / temperature : NAN;
  }
  template <int W>
  __device__ __forceinline__ Inner<Pack<float, W>> inner() const {
    return {inner_.scale, inner_.cap, inner_.within};
  }
  // A loop over the elements of a chunk, two at a time, cannot number its registers. So the elements move on: the first
  // two leave, and their results come last. Without the loop, the compiler would take all elements at once, with twenty
  // registers more, also in kernels that run without inner.
  template <int kCount>
  static __device__ __forceinline__ Pack<float, 2> first_two(const float (&numbers)[kCount]) {
    Pack<float, 2> result;
    result.of[0] = numbers[0];
    result.of[1] = numbers[1];
    return result;
  }
  template <int kCount>
  static __device__ __forceinline__ void rotate(float (&numbers)[kCount], float a, float b) {
    MONOSOFTMAX_UNROLL for (int i = 2; i < kCount; ++i) numbers[i - 2] = numbers[i];
    numbers[kCount - 2] = a;
    numbers[kCount - 1] = b;
  }

  const InnerArguments inner_;
  const float* const temperature_;
};

// f of a kernel, with its coefficients in shared memory.
template <class Transform>
__device__ __forceinline__ Composed<typename Transform::Over> load_composed(const TransformArguments& arguments,
                                                                            unsigned char* shared) {
  return {Transform::load(arguments, shared), arguments};
}

}  // namespace monosoftmax::cuda
