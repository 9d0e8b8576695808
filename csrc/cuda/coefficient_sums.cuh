// Sums over logits of dL/dy * df/dcoefficient: the gradients of the coefficients. Each block, or each warp, writes its
// sums to its own memory. A second stage in torch adds them up in float64 and in a fixed order, so that sums are the
// same in every run.
//
//   NoSums       the call needs no sums
//   VectorSums   a few numbers, in the registers of each thread
//   LaneSums     each thread has its own table in shared memory, [entry][thread]. Threads with logits in the same
//                piece add to different addresses: no atomics, no bank conflicts, a fixed order of additions. A logit
//                takes a load, two additions and a store of 8 bytes.
//   WarpSums     each warp has its own table in global memory, if tables are too large for LaneSums. Lanes with logits
//                in the same piece first add up among themselves, in the order of the lanes. The lowest of them adds
//                to the table. If these tables would take too much memory, there is one table for all warps, in
//                float64. Atomics add to it, in an order that changes from run to run.
//
// Lanes do meet: 2 to 4 of them in a piece, with 64 pieces and normally distributed logits
// (tests/emulated/test_cuda_coefficient_sums.py).
#pragma once

#include "arguments.h"
#include "reduce.cuh"

namespace monosoftmax::cuda {

struct NoSums {
  static constexpr bool kNeeded = false, kWarpWide = false;

  __device__ NoSums(const SumsArguments&, const TransformArguments&, unsigned char*) {}
  template <class F, class T>
  __device__ __forceinline__ void add(const F&, const typename F::Point&, T, T) {}
  __device__ void finish() {}
};

template <class T, int kCount>
class VectorSums {
 public:
  static constexpr bool kNeeded = true, kWarpWide = false;

  __device__ VectorSums(const SumsArguments& arguments, const TransformArguments&, unsigned char*)
      : partials_(arguments.partials) {
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) sums_[i] = T(0);
  }
  template <class F>
  __device__ __forceinline__ void add(const F& f, const typename F::Point& point, T z, T gradient) {
    f.accumulate(point, z, gradient, sums_);
  }
  __device__ void finish() {
    SHARED_ARRAY(float, of_warps, [kCount][kMostWarps]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    float sums[kCount];
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) {
      sums[i] = 0;
      MONOSOFTMAX_UNROLL for (int j = 0; j < T::kWidth; ++j) sums[i] += sums_[i].of[j];
      sums[i] = reduce_warp<Sum>(sums[i]);
      if (lane == 0) of_warps[i][warp] = sums[i];
    }
    __syncthreads();
    MONOSOFTMAX_UNROLL for (int i = 0; i < kCount; ++i) {
      const float sum = reduce_warp<Sum>(lane < warps ? of_warps[i][lane] : 0.0f);
      if (threadIdx.x == 0) partials_[static_cast<int64_t>(blockIdx.x) * kCount + i] = sum;
    }
  }

 private:
  float* partials_;
  T sums_[kCount];
};

// The sums of one thread for a vector of any length, in shared memory [coefficient][thread]. accumulate() uses a
// LaneColumn like a T*. A read returns the sum in the first lane of a T. An assignment adds up the lanes of a T.
template <class T>
class LaneColumn {
 public:
  class Entry {
   public:
    explicit __device__ Entry(float* at) : at_(at) {}
    __device__ __forceinline__ operator T() const {
      T sum(0);
      sum.of[0] = *at_;
      return sum;
    }
    __device__ __forceinline__ void operator=(const T& sums) {
      float sum = sums.of[0];
      MONOSOFTMAX_UNROLL for (int i = 1; i < T::kWidth; ++i) sum += sums.of[i];
      *at_ = sum;
    }

   private:
    float* at_;
  };

  explicit __device__ LaneColumn(float* first) : first_(first) {}
  __device__ __forceinline__ Entry operator[](int64_t i) const {
    return Entry(first_ + static_cast<int>(i) * blockDim.x);
  }
  friend __device__ __forceinline__ T operator+(const Entry& entry, const T& other) {
    return static_cast<T>(entry) + other;
  }
  friend __device__ __forceinline__ T operator-(const Entry& entry, const T& other) {
    return static_cast<T>(entry) - other;
  }

 private:
  float* first_;
};

// F: the transform over T. It has a table of kTableRows rows, or with 0 rows a vector of coefficients.
template <class F, class T>
class LaneSums {
 public:
  static constexpr bool kNeeded = true, kWarpWide = false;
  static constexpr int kRows = F::kTableRows, kPairs = kRows / 2;
  static_assert(kRows % 2 == 0, "pairs of rows");

  __device__ LaneSums(const SumsArguments& arguments, const TransformArguments& transform, unsigned char* shared)
      : partials_(arguments.partials),
        lanes_(reinterpret_cast<float*>(shared)),
        size_(static_cast<int>(transform.size)),
        entry_bytes_(kPairs * blockDim.x * static_cast<unsigned>(sizeof(float2))),
        mine_(shared + threadIdx.x * sizeof(float2)) {
    // Each thread clears its own sums: so it need not wait for other threads before it adds.
    const int threads = blockDim.x;
    if constexpr (kRows == 0) {
      for (int i = 0; i < size_; ++i) lanes_[i * threads + threadIdx.x] = 0;
    } else {
      const int entries = static_cast<int>(F::entries(size_));
      float2* pairs = reinterpret_cast<float2*>(lanes_);
      for (int i = 0; i < entries * kPairs; ++i) pairs[i * threads + threadIdx.x] = {0, 0};
    }
  }
  __device__ __forceinline__ void add(const F& f, const typename F::Point& point, T z, T gradient) {
    if constexpr (kRows == 0) {
      f.accumulate(point, z, gradient, LaneColumn<T>(lanes_ + threadIdx.x));
    } else {
      T factors[kRows];
      f.differentiate(point, z, factors);
      MONOSOFTMAX_UNROLL for (int i = 0; i < T::kWidth; ++i) {
        // The logits of a thread may lie in the same piece. So they are added one after the other.
        unsigned at = point.piece.bits.of[i] * entry_bytes_;
        MONOSOFTMAX_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
          float2 sums = mine_.template load_again<float2>(at);
          sums.x = __fmaf_rn(gradient.of[i], factors[2 * pair].of[i], sums.x);
          sums.y = __fmaf_rn(gradient.of[i], factors[2 * pair + 1].of[i], sums.y);
          mine_.store(at, sums);
          at += blockDim.x * static_cast<unsigned>(sizeof(float2));
        }
      }
    }
  }
  __device__ void finish() {
    __syncthreads();
    const int threads = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = threads / kWarp;
    if constexpr (kRows == 0) {
      float* to = partials_ + static_cast<int64_t>(blockIdx.x) * size_;
      for (int i = warp; i < size_; i += warps) {
        float sum = 0;
        for (int j = lane; j < threads; j += kWarp) sum += lanes_[i * threads + j];
        sum = reduce_warp<Sum>(sum);
        if (lane == 0) to[i] = sum;
      }
    } else {
      float* to = partials_ + static_cast<int64_t>(blockIdx.x) * size_ * kRows;
      const float2* pairs = reinterpret_cast<const float2*>(lanes_);
      for (int i = warp; i < size_ * kPairs; i += warps) {
        const int piece = i / kPairs, pair = i % kPairs;
        // Entries beyond the last piece repeat it, so their sums belong to it.
        const int end = piece == size_ - 1 ? static_cast<int>(F::entries(size_)) : piece + 1;
        float2 sum = {0, 0};
        for (int entry = piece; entry < end; ++entry) {
          for (int j = lane; j < threads; j += kWarp) {
            const float2 part = pairs[(entry * kPairs + pair) * threads + j];
            sum.x += part.x;
            sum.y += part.y;
          }
        }
        sum.x = reduce_warp<Sum>(sum.x);
        sum.y = reduce_warp<Sum>(sum.y);
        if (lane == 0) {
          to[2 * pair * size_ + piece] = sum.x;
          to[(2 * pair + 1) * size_ + piece] = sum.y;
        }
      }
    }
  }

 private:
  float* partials_;
  float* lanes_;
  int size_;
  unsigned entry_bytes_;
  SharedBytes mine_;
};

// All lanes of a warp must call add(). The tables [tables][kTableRows][size] must be 0 at the start.
template <class F, class T>
class WarpSums {
 public:
  static constexpr bool kNeeded = true, kWarpWide = true;
  static constexpr int kRows = F::kTableRows;

  __device__ WarpSums(const SumsArguments& arguments, const TransformArguments& transform, unsigned char*)
      : table_(nullptr), total_(arguments.total), size_(transform.size) {
    if (total_ != nullptr) return;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    table_ = arguments.partials + warp * kRows * size_;
  }
  __device__ __forceinline__ void add(const F& f, const typename F::Point& point, T z, T gradient) {
    T factors[kRows];
    f.differentiate(point, z, factors);
    MONOSOFTMAX_UNROLL for (int i = 0; i < T::kWidth; ++i) {
      const int piece = static_cast<int>(point.piece.bits.of[i] - kNumberBits);
      float sums[kRows];
      MONOSOFTMAX_UNROLL for (int r = 0; r < kRows; ++r) sums[r] = gradient.of[i] * factors[r].of[i];
      if (add_up_equal(piece, sums)) {
        if (total_ != nullptr) {
          MONOSOFTMAX_UNROLL for (int r = 0; r < kRows; ++r) atomicAdd(total_ + r * size_ + piece, sums[r]);
        } else {
          MONOSOFTMAX_UNROLL for (int r = 0; r < kRows; ++r) table_[r * size_ + piece] += sums[r];
        }
      }
      // For the next logit, another lane may be the lowest in this piece and add to the same entry.
      __syncwarp();
    }
  }
  __device__ void finish() {}

 private:
  // Adds up the sums of the lanes with the same piece, in the order of a tree over these lanes. The lowest of them gets
  // the result. Returns whether this lane is the lowest.
  static __device__ __forceinline__ bool add_up_equal(int piece, float (&sums)[kRows]) {
    const unsigned lane = threadIdx.x % kWarp;
    const unsigned equal = __match_any_sync(kAllLanes, piece);
    unsigned rank = __popc(equal & ((1u << lane) - 1));
    const bool lowest = rank == 0;
    unsigned above = equal & (~1u << lane);
    while (__any_sync(kAllLanes, above != 0)) {
      const int next = __ffs(above);
      MONOSOFTMAX_UNROLL for (int r = 0; r < kRows; ++r) {
        const float theirs = __shfl_sync(kAllLanes, sums[r], next > 0 ? next - 1 : lane);
        if (next > 0) sums[r] += theirs;
      }
      // Lanes of odd rank are done: the lane before has added their sums.
      above &= __ballot_sync(kAllLanes, (rank & 1) == 0);
      rank >>= 1;
    }
    return lowest;
  }

  float* table_;
  double* total_;
  int64_t size_;
};

}  // namespace monosoftmax::cuda
