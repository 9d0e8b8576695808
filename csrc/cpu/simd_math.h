// exp, log1p and tanh of vectors of floats, inlined: a call of a vector library costs more than the arithmetic.
//
// The largest errors over one in 37 of all floats, against double precision: exp 1.5 ulp for |x| <= 10, growing to
// 4.5 ulp at the ends of the range (1.1 without FMA), log1p 2.8 ulp, tanh 2.7 ulp and its slope 3.4. NaN gives NaN.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace monosoftmax::cpu {
// Each instruction set needs its own names: if two files define the same name, the linker keeps only one definition.
inline namespace CPU_CAPABILITY {

using Floats = at::vec::Vectorized<float>;

#if defined(CPU_CAPABILITY_AVX512)
// torch's comparisons turn a mask into a vector. These instructions take the mask itself.
using FloatMask = __mmask16;
inline FloatMask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline FloatMask less_equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Floats select(FloatMask mask, Floats a, Floats b) { return _mm512_mask_blend_ps(mask, b, a); }
#else
using FloatMask = Floats;
inline FloatMask less(Floats a, Floats b) { return a < b; }
inline FloatMask less_equal(Floats a, Floats b) { return a <= b; }
inline Floats select(FloatMask mask, Floats a, Floats b) { return Floats::blendv(b, a, mask); }
#endif

// exp(x) for -87 <= x <= 88.
//
// x = n log 2 + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 rounds n, into the low bits of a float. exp(r) is
// 1 + r + r^2 q(r), with q fitted to (e^r - 1 - r) / r^2 for least relative error.
inline Floats simd_exp_normal(Floats x) {
  const Floats magic(12582912.0f);
  const Floats shifted = at::vec::fmadd(x, Floats(1.44269504f), magic);
  const Floats n = shifted - magic;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  const Floats r = at::vec::fmadd(n, Floats(-0.693147182f), x);  // exact but for log 2, which is 2e-9 too large
#else
  Floats r = at::vec::fmadd(n, Floats(-0.693359375f), x);
  r = at::vec::fmadd(n, Floats(2.12194440e-4f), r);
#endif
  Floats q(1.390128687e-3f);
  q = at::vec::fmadd(q, r, Floats(8.363146344e-3f));
  q = at::vec::fmadd(q, r, Floats(4.166685343e-2f));
  q = at::vec::fmadd(q, r, Floats(0.1666657728f));
  q = at::vec::fmadd(q, r, Floats(0.4999999955f));
  const Floats exp_r = at::vec::fmadd(r * r, q, r) + Floats(1.0f);
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(exp_r, n);
#else
  using Ints = at::vec::Vectorized<int32_t>;
  const Ints power = at::vec::cast<int32_t>(shifted) << Ints(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(exp_r) + power);
#endif
}

// exp(x) for x <= 88. Results below the smallest normal number are 0.
inline Floats simd_exp(Floats x) { return select(less(x, Floats(-87.0f)), Floats(0.0f), simd_exp_normal(x)); }

// log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)).
inline Floats simd_log1p(Floats x) {
  const Floats s = x / (Floats(2.0f) + x);
  const Floats square = s * s;
  Floats q(0.1408916686f);
  q = at::vec::fmadd(q, square, Floats(0.1398030151f));
  q = at::vec::fmadd(q, square, Floats(0.2001245513f));
  q = at::vec::fmadd(q, square, Floats(0.3333315734f));
  q = at::vec::fmadd(q, square, Floats(1.000000004f));
  return (s + s) * q;
}

// tanh(x), and its derivative 1 - tanh(x)^2 to the same relative accuracy. With e = exp(-2 |x|), 1 - |tanh| is
// 2 e / (1 + e). Near x = 0, tanh is x + x^3 q(x^2).
inline Floats simd_tanh(Floats x, Floats& slope) {
  const Floats size = at::vec::clamp_max(x.abs(), Floats(40.0f));
  const Floats e = simd_exp_normal(Floats(-2.0f) * size);
  const Floats complement = (e + e) / (Floats(1.0f) + e);
  const Floats square = x * x;
  Floats q(-6.943115849e-3f);
  q = at::vec::fmadd(q, square, Floats(2.147077441e-2f));
  q = at::vec::fmadd(q, square, Floats(-5.393348464e-2f));
  q = at::vec::fmadd(q, square, Floats(0.1333322587f));
  q = at::vec::fmadd(q, square, Floats(-0.3333333280f));
  const Floats small = at::vec::fmadd(x * square, q, x);
  const Floats large = (Floats(1.0f) - complement) | (x & Floats(-0.0f));
  slope = complement * (Floats(2.0f) - complement);
  return select(less(size, Floats(0.5f)), small, large);
}

}  // namespace CPU_CAPABILITY
}  // namespace monosoftmax::cpu
