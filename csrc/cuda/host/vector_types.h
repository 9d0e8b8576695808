// The vector types of CUDA that the kernels use, with CUDA's alignments: the undefined-behaviour sanitizer reports a
// vector load of misaligned memory. Kernels load elements of any type as vectors, hence may_alias.
#pragma once

struct uint3 {
  unsigned x, y, z;
};
struct __attribute__((aligned(8), may_alias)) int2 {
  int x, y;
};
struct __attribute__((aligned(8), may_alias)) uint2 {
  unsigned x, y;
};
struct __attribute__((aligned(8), may_alias)) float2 {
  float x, y;
};
struct __attribute__((aligned(16), may_alias)) int4 {
  int x, y, z, w;
};
struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((aligned(16), may_alias)) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
