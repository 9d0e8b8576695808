// The launchers, and the kernels that take no rows of logits.
#include "../transforms/registry.h"
#include "launch_kernel.cuh"
#include "memory.cuh"
#include "plif_coefficients.cuh"
#include "transform.cuh"
#include "typed_launch.h"

namespace monosoftmax::cuda {

namespace {

constexpr int kThreads = 256;

// Memory traffic: none if the factor is 1, otherwise a read and a write of each element. Threads take chunks of 16
// bytes. The first threads also take the elements before the first and after the last chunk.
template <class E>
__global__ void __launch_bounds__(kThreads) scale_kernel(E* x, int64_t count, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  constexpr int kElements = Chunk<E>::kElements;
  const auto beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(x)) % kChunkBytes;
  const int64_t before = (kChunkBytes - beyond) % kChunkBytes / sizeof(E);
  const int64_t head = before < count ? before : count, chunks = (count - head) / kElements;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t c = thread; c < chunks; c += threads) {
    float values[kElements];
    E* at = x + head + c * kElements;
    load_chunk(at).unpack(values);
    MONOSOFTMAX_UNROLL for (int i = 0; i < kElements; ++i) values[i] *= by;
    store_chunk(at, values, true);
  }
  const int64_t edges = count - chunks * kElements;
  if (thread < edges) {
    E* at = x + (thread < head ? thread : chunks * kElements + thread);
    store_element(at, load_element(at) * by);
  }
}

template <class E>
void launch_scale_of(void* x, int64_t count, const float* factor, int multiprocessors, Stream stream) {
  constexpr int64_t kBlocksOfMultiprocessor = 8;
  const int64_t blocks = (count / Chunk<E>::kElements + kThreads) / kThreads;
  const int64_t most = kBlocksOfMultiprocessor * multiprocessors;
  launch_kernel<E*, int64_t, const float*>(scale_kernel<E>, {static_cast<int>(blocks < most ? blocks : most), kThreads},
                                           stream, static_cast<E*>(x), count, factor);
}

// One block, with no more warps than the pieces need.
Shape shape_for_pieces(int64_t pieces) {
  const int64_t threads = (pieces + kWarp - 1) / kWarp * kWarp;
  return {1, static_cast<int>(threads < kMostThreadsOfPlif ? threads : kMostThreadsOfPlif)};
}

template <template <class> class F>
int64_t table_numbers_of(int64_t) {
  return 0;
}
template <template <class, bool> class F>
int64_t table_numbers_of(int64_t size) {
  return size * TableTransform<F, Float, false>::kStride;
}

template <template <class> class F>
void fill_table_of(const TransformArguments&, float*, Stream) {}
template <template <class, bool> class F>
void fill_table_of(const TransformArguments& arguments, float* table, Stream stream) {
  const int64_t blocks = (arguments.size + kThreads - 1) / kThreads;
  launch_kernel<TransformArguments, float*>(fill_table_kernel<TableTransform<F, Float, false>>,
                                            {static_cast<int>(blocks < 1024 ? blocks : 1024), kThreads}, stream,
                                            arguments, table);
}

}  // namespace

// Calls visitor(E()) with the type of logits.
template <class Visitor>
static void with_element(ElementType element, Visitor&& visitor) {
  switch (element) {
    case ElementType::kFloat: return visitor(float());
    case ElementType::kBFloat16: return visitor(BFloat16());
    case ElementType::kHalf: return visitor(Half());
  }
}

void launch_cross_entropy(const Plan& plan, std::string_view transform, ElementType element,
                          const CrossEntropyArguments& arguments, Stream stream) {
  with_element(element, [&](auto e) { launch_cross_entropy_of<decltype(e)>(plan, transform, arguments, stream); });
}
void launch_log_softmax(const Plan& plan, std::string_view transform, ElementType element,
                        const LogSoftmaxArguments& arguments, Stream stream) {
  with_element(element, [&](auto e) { launch_log_softmax_of<decltype(e)>(plan, transform, arguments, stream); });
}
void launch_log_softmax_backward(const Plan& plan, std::string_view transform, ElementType element,
                                 const LogSoftmaxBackwardArguments& arguments, Stream stream) {
  with_element(element,
               [&](auto e) { launch_log_softmax_backward_of<decltype(e)>(plan, transform, arguments, stream); });
}
void launch_token_statistics(const Plan& plan, std::string_view transform, ElementType element,
                             const TokenStatisticsArguments& arguments, Stream stream) {
  with_element(element, [&](auto e) { launch_token_statistics_of<decltype(e)>(plan, transform, arguments, stream); });
}
void launch_dense_target(const Plan& plan, std::string_view transform, ElementType element,
                         const DenseTargetArguments& arguments, Stream stream) {
  with_element(element, [&](auto e) { launch_dense_target_of<decltype(e)>(plan, transform, arguments, stream); });
}

int64_t table_numbers(std::string_view transform, int64_t size) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST) \
  if (transform == NAME) return table_numbers_of<CLASS>(size);
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
  return 0;
}

void launch_fill_table(std::string_view transform, const TransformArguments& arguments, float* table, Stream stream) {
#define ROW(NAME, CLASS, ROWS, SMALLEST, LARGEST) \
  if (transform == NAME) return fill_table_of<CLASS>(arguments, table, stream);
  MONOSOFTMAX_TRANSFORMS(ROW)
#undef ROW
}

void launch_plif_coefficients(const PlifArguments& arguments, Stream stream) {
  launch_kernel<PlifArguments>(plif_coefficients_kernel, shape_for_pieces(arguments.grid.pieces), stream, arguments);
}
void launch_plif_coefficients_backward(const PlifArguments& arguments, Stream stream) {
  launch_kernel<PlifArguments>(plif_coefficients_backward_kernel, shape_for_pieces(arguments.grid.pieces), stream,
                               arguments);
}

void launch_scale(void* x, ElementType element, int64_t count, const float* factor, int multiprocessors,
                  Stream stream) {
  if (count == 0) return;
  with_element(element, [&](auto e) { launch_scale_of<decltype(e)>(x, count, factor, multiprocessors, stream); });
}

}  // namespace monosoftmax::cuda
