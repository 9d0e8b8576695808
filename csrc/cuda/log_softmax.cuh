// log p of rows of logits, and the gradients with respect to logits and coefficients.
//
//   log p_j = (y_j - largest) - log(sum),   dL/dy_j = g_j - p_j sum_i g_i,   dL/dz = dL/dy f'(inner(z)) inner'(z) / tau
//
// where y = f(inner(z)) / tau, and largest is the largest y.
// Memory traffic for each logit. Forward: a read from memory, one more from the L2 cache if the row is still there, and
// a write. Backward: a read and a write, and two reads of the upstream gradient; the second may come from the L2 cache.
// Numerics: scan.cuh, composition.cuh. Hazards: a thread only writes elements that no other thread reads, so
// that log p may overwrite the logits.
#pragma once

#include "coefficient_sums.cuh"
#include "other_row.cuh"
#include "scan.cuh"
#include "transform.cuh"

namespace monosoftmax::cuda {

template <class Transform, class T, class E>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks) log_softmax_kernel(const LogSoftmaxArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ScanMemory, memory, [1]);
  constexpr int kElements = Chunk<E>::kElements;
  const auto f = load_composed<Transform>(arguments.transform, shared);
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
    const float shift = f.shift_of(scan.largest), log2_sum = scan.sum == 0 ? NAN : log2f(scan.sum);
    for (int c = team.thread; c < layout.chunks(); c += team.threads) {
      float values[kElements];
      f.unpack(in_memory.chunk(c, 0), values);
      for_each_group<T>(values, [&](T z, int i) {
        const T value = f.function.value(z);
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) {
          values[i + j] = (f.gap(value.of[j], shift) - log2_sum) * kLn2;
        }
      });
      output.store(layout.column_of_chunk(c), values);
    }
    for (int e = team.thread; e < layout.edges(); e += team.threads) {
      const float gap = f.gap(f.template of_logit<T>(in_memory.edge(e)), shift);
      const float log_p[1] = {(gap - log2_sum) * kLn2};
      output.store(layout.column_of_edge(e), log_p);
    }
  }
}

template <class Transform, class T, class Sums, class E>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    log_softmax_backward_kernel(const LogSoftmaxBackwardArguments arguments) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ReductionMemory<1>, memory, [2]);
  constexpr int kElements = Chunk<E>::kElements;
  const auto f = load_composed<Transform>(arguments.transform, shared);
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
    const float shift = f.shift_of(arguments.largest[row]), sum = arguments.sum[row];
    const float inverse_temperature = f.inverse_temperature();
    const float of_p = sum == 0 ? NAN : grad_sum[0] * inverse_temperature / sum;
    // As in cross_entropy.cuh, WarpSums need whole warps: all lanes go on as long as one of them has a chunk.
    for (int c = team.thread; (Sums::kWarpWide ? c - lane : c) < layout.chunks(); c += team.threads) {
      const bool here = !Sums::kWarpWide || c < layout.chunks();
      const int column = layout.column_of_chunk(c);
      Chunk<E> chunk = here ? in_memory.chunk(c, 0) : Chunk<E>::lowest();
      if constexpr (Sums::kNeeded) chunk = chunk.larger(Chunk<E>::lowest());
      float values[kElements], g[kElements] = {};
      f.unpack(chunk, values);
      if (here) upstream.load(column, g);
      if (f.has_temperature()) {
        MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) g[i] *= inverse_temperature;
      }
      for_each_group<T>(values, [&](T z, int i) {
        const auto point = f.function.at(z);
        const T e = f.exponential(point.value, shift);
        T df;
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) df.of[j] = __fmaf_rn(-e.of[j], of_p, g[i + j]);
        if (Sums::kWarpWide && !here) df = T(0);
        sums.add(f.function, point, z, df);
        const T dz = df * point.derivative;
        MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) values[i + j] = dz.of[j];
      });
      if (here) f.chain(values, [&] { return in_memory.chunk_again(c, 0); });
      if (grad_row != nullptr && here) store_chunk(grad_row + column, values, aligned);
    }
    for (int edge = team.thread; (Sums::kWarpWide ? edge - lane : edge) < layout.edges(); edge += team.threads) {
      const bool here = !Sums::kWarpWide || edge < layout.edges();
      const int column = here ? layout.column_of_edge(edge) : 0;
      float logit = here ? in_memory.edge(edge) : 0, g[1] = {0};
      if constexpr (Sums::kNeeded) logit = fmaxf(logit, lowest_logit<E>());
      if (here) upstream.load(column, g);
      const auto [argument, slope] = f.argument(logit);
      const T z(argument);
      const auto point = f.function.at(z);
      T df(0);
      if (here) {
        df.of[0] = __fmaf_rn(-f.exponential(point.value, shift).of[0], of_p, g[0] * inverse_temperature);
      }
      sums.add(f.function, point, z, df);
      if (grad_row != nullptr && here) store_element(grad_row + column, df.of[0] * point.derivative.of[0] * slope);
    }
  }
  sums.finish();
}

}  // namespace monosoftmax::cuda
