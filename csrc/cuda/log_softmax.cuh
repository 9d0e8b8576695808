// log p of rows of logits, and the gradients with respect to logits and coefficients.
//
//   log p_j = (y_j - largest) - log(sum),   dL/dy_j = g_j - p_j sum_i g_i,   dL/dz = dL/dy f'(z)
//
// Memory traffic for each logit. Forward: a read from memory, one more from the L2 cache if the row is still there, and
// a write. Backward: a read and a write, and two reads of the upstream gradient; the second may come from the L2 cache.
// Numerics: scan.cuh. Hazards: a thread only writes elements that no other thread reads.
#pragma once

#include "coefficient_sums.cuh"
#include "scan.cuh"
#include "transform.cuh"

namespace monosoftmax::cuda {

// A row with its own type and alignment, visited in the layout of the row of logits.
class OtherRow {
 public:
  __device__ OtherRow(const void* rows, ElementType type, int64_t offset)
      : row_(static_cast<unsigned char*>(const_cast<void*>(rows)) + offset * (type == ElementType::kFloat ? 4 : 2)),
        type_(type) {}

  // Loads kCount elements from a column on.
  template <int kCount>
  __device__ __forceinline__ void load(int column, float (&values)[kCount]) const {
    if (type_ == ElementType::kFloat) {
      load_as<float>(column, values);
    } else if (type_ == ElementType::kBFloat16) {
      load_as<BFloat16>(column, values);
    } else {
      load_as<Half>(column, values);
    }
  }
  template <int kCount>
  __device__ __forceinline__ void store(int column, const float (&values)[kCount]) const {
    if (type_ == ElementType::kFloat) {
      store_as<float>(column, values);
    } else if (type_ == ElementType::kBFloat16) {
      store_as<BFloat16>(column, values);
    } else {
      store_as<Half>(column, values);
    }
  }

 private:
  // Whether kCount elements there can be accessed as chunks.
  template <class E, int kCount>
  static __device__ __forceinline__ bool in_chunks(const E* at) {
    return kCount % Chunk<E>::kElements == 0 && reinterpret_cast<uintptr_t>(at) % kChunkBytes == 0;
  }
  template <class E, int kCount>
  __device__ __forceinline__ void load_as(int column, float (&values)[kCount]) const {
    const E* at = reinterpret_cast<const E*>(row_) + column;
    constexpr int kElements = Chunk<E>::kElements;
    if constexpr (kCount % kElements == 0) {
      if (in_chunks<E, kCount>(at)) {
        MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; i += kElements) {
          float part[kElements];
          load_chunk(at + i).unpack(part);
          MONOSOFTMAX_UNROLL for (int j = 0; j < kElements; ++j) values[i + j] = part[j];
        }
        return;
      }
    }
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) values[i] = load_element(at + i);
  }
  template <class E, int kCount>
  __device__ __forceinline__ void store_as(int column, const float (&values)[kCount]) const {
    E* at = reinterpret_cast<E*>(row_) + column;
    constexpr int kElements = Chunk<E>::kElements;
    if constexpr (kCount % kElements == 0) {
      if (in_chunks<E, kCount>(at)) {
        MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; i += kElements) {
          float part[kElements];
          MONOSOFTMAX_UNROLL for (int j = 0; j < kElements; ++j) part[j] = values[i + j];
          store_chunk(at + i, part, true);
        }
        return;
      }
    }
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) store_element(at + i, values[i]);
  }

  unsigned char* row_;
  ElementType type_;
};

template <class Transform, class T, class E>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks) log_softmax_kernel(const LogSoftmaxArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  constexpr int kElements = Chunk<E>::kElements;
  const auto f = Transform::load(arguments.transform, shared);
  const Team team;
  for (int64_t row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const E* logits = static_cast<const E*>(arguments.input) + row * arguments.stride;
    const RowLayout<E> layout(logits, arguments.classes, -1);
    const RowInMemory<E> in_memory{logits, layout};
    const RowScan scan = scan_once<T, false>(f, {nullptr, 0}, in_memory, team, -1, memory[0]);
    if (team.thread == 0) {
      arguments.largest[row] = scan.largest;
      arguments.sum[row] = scan.sum;
    }
    const OtherRow output(arguments.output, arguments.output_type, row * arguments.output_stride);
    const float shift = scan.largest * kLog2E, log2_sum = scan.sum == 0 ? NAN : log2f(scan.sum);
    for (int c = team.thread; c < layout.chunks(); c += team.threads) {
      float values[kElements];
      in_memory.chunk(c, 0).unpack(values);
      for_each_group<T>(values, [&](T z, int i) {
        const T y = f.value(z);
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
          values[i + j] = (__fmaf_rn(y.of[j], kLog2E, -shift) - log2_sum) * kLn2;
        }
      });
      output.store(layout.column_of_chunk(c), values);
    }
    for (int e = team.thread; e < layout.edges(); e += team.threads) {
      const float y = f.value(T(in_memory.edge(e))).of[0];
      const float value[1] = {(__fmaf_rn(y, kLog2E, -shift) - log2_sum) * kLn2};
      output.store(layout.column_of_edge(e), value);
    }
  }
}

template <class Transform, class T, class Sums, class E>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    log_softmax_backward_kernel(const LogSoftmaxBackwardArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ReductionMemory<1>, memory, [2]);
  constexpr int kElements = Chunk<E>::kElements;
  const auto f = Transform::load(arguments.transform, shared);
  Sums sums(arguments.sums, arguments.transform, shared + arguments.sums_offset);
  const Team team;
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = blockIdx.x, turn = 0; row < arguments.rows; row += gridDim.x, ++turn) {
    const E* logits = static_cast<const E*>(arguments.input) + row * arguments.stride;
    E* grad_row =
        arguments.grad_input == nullptr ? nullptr : static_cast<E*>(arguments.grad_input) + row * arguments.grad_stride;
    const bool aligned = equally_aligned<E>(logits, grad_row);
    const RowLayout<E> layout(logits, arguments.classes, -1);
    const RowInMemory<E> in_memory{logits, layout};
    const OtherRow upstream(arguments.grad_output, arguments.grad_output_type, row * arguments.grad_output_stride);
    float grad_sum[1] = {0};
    for (int c = team.thread; c < layout.chunks(); c += team.threads) {
      float g[kElements];
      upstream.load(layout.column_of_chunk(c), g);
      MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) grad_sum[0] += g[i];
    }
    for (int e = team.thread; e < layout.edges(); e += team.threads) {
      float g[1];
      upstream.load(layout.column_of_edge(e), g);
      grad_sum[0] += g[0];
    }
    // Rows use the two memories in turn, since each row has only one barrier.
    reduce<Sum>(grad_sum, memory[turn % 2]);
    const float shift = arguments.largest[row] * kLog2E, sum = arguments.sum[row];
    const float of_p = sum == 0 ? NAN : grad_sum[0] / sum;
    // As in cross_entropy.cuh, WarpSums need whole warps: all lanes go on as long as one of them has a chunk.
    for (int c = team.thread; (Sums::kWarpWide ? c - lane : c) < layout.chunks(); c += team.threads) {
      const bool here = !Sums::kWarpWide || c < layout.chunks();
      const int column = layout.column_of_chunk(c);
      Chunk<E> chunk = here ? in_memory.chunk(c, 0) : Chunk<E>::lowest();
      if constexpr (Sums::kNeeded) chunk = chunk.larger(Chunk<E>::lowest());
      float values[kElements], g[kElements] = {};
      chunk.unpack(values);
      if (here) upstream.load(column, g);
      for_each_group<T>(values, [&](T z, int i) {
        const auto point = f.at(z);
        const T e = exponential(point.value, shift);
        T dy;
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) dy.of[j] = __fmaf_rn(-e.of[j], of_p, g[i + j]);
        if (Sums::kWarpWide && !here) dy = T(0);
        sums.add(f, point, z, dy);
        const T dz = dy * point.derivative;
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) values[i + j] = dz.of[j];
      });
      if (grad_row != nullptr && here) store_chunk(grad_row + column, values, aligned);
    }
    for (int edge = team.thread; (Sums::kWarpWide ? edge - lane : edge) < layout.edges(); edge += team.threads) {
      const bool here = !Sums::kWarpWide || edge < layout.edges();
      const int column = here ? layout.column_of_edge(edge) : 0;
      float logit = here ? in_memory.edge(edge) : 0, g[1] = {0};
      if constexpr (Sums::kNeeded) logit = fmaxf(logit, lowest_logit<E>());
      if (here) upstream.load(column, g);
      const T z(logit);
      const auto point = f.at(z);
      T dy(0);
      if (here) dy.of[0] = __fmaf_rn(-exponential(point.value, shift).of[0], of_p, g[0]);
      sums.add(f, point, z, dy);
      if (grad_row != nullptr && here) store_element(grad_row + column, dy.of[0] * point.derivative.of[0]);
    }
  }
  sums.finish();
}

}  // namespace monosoftmax::cuda
