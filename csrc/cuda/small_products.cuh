// Small matrix products in float32: out = left · right (+ bias), of any strides and storage types, for every
// matrix of a batch. Device code only, no torch headers.
//
// Made for products of a few hundred rows and columns, which take microseconds and are bound by latency: the
// next slab of depth is on its way in registers while the one in shared memory is multiplied, and two
// products that do not need each other share a launch. No tensor cores: TF32 would cost the digits that
// float32 has.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace fastssl::cuda::products {

constexpr int kThreads = 128;
constexpr int kTile = 32;                        // rows and columns of a block's part of the result
constexpr int kSlab = 64;                        // depth that is in shared memory at a time
constexpr int kPitch = kTile + 4;                // one depth of a slab, in floats
constexpr int kHeld = kSlab * kTile / kThreads;  // elements of a slab that a thread carries

// A matrix per batch, by strides in elements.
struct Operand {
  const void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t batch = 0, row = 0, column = 0;
};
struct Result {
  void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t batch = 0, row = 0, column = 0;
};

struct Product {
  int rows = 0, columns = 0, depth = 0, batches = 0;
  Operand left;   // (rows, depth)
  Operand right;  // (depth, columns)
  Operand bias;   // (columns,), or no data
  Result out;     // (rows, columns)
};
struct Pair {
  Product first, second;
};

__host__ __device__ inline int64_t tiles_along(int64_t length) { return (length + kTile - 1) / kTile; }
__host__ __device__ inline int64_t blocks_of(const Product& p) {
  return p.batches * tiles_along(p.rows) * tiles_along(p.columns);
}

// Element j of a thread's share of a slab: place i along the tile, k along the depth. Neighbouring lanes take
// neighbours in memory. Eight depths of four places hit 32 different banks of shared memory (kPitch).
__device__ __forceinline__ void place_of(int j, int thread, bool along_depth, int& i, int& k) {
  const int lane = thread % kWarp, warp = thread / kWarp;
  i = along_depth ? lane / 8 + 4 * warp + 16 * (j / 8) : lane;
  k = along_depth ? lane % 8 + 8 * (j % 8) : warp + kThreads / kWarp * j;
}

template <class T>
__device__ __forceinline__ void fetch_as(float (&held)[kHeld], const T* data, int64_t place_stride,
                                         int64_t depth_stride, int places, int depths, int thread) {
  const bool along_depth = depth_stride <= place_stride;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    int i, k;
    place_of(j, thread, along_depth, i, k);
    held[j] = i < places && k < depths ? to_float(data[i * place_stride + k * depth_stride]) : 0.f;
  }
}

// Brings a slab into registers, zeros where it ends. `at` is where it starts, in elements.
__device__ __forceinline__ void fetch(float (&held)[kHeld], const Operand& from, int64_t at,
                                      int64_t place_stride, int64_t depth_stride, int places, int depths,
                                      int thread) {
  switch (from.storage) {
    case Storage::float32:
      return fetch_as(held, static_cast<const float*>(from.data) + at, place_stride, depth_stride, places,
                      depths, thread);
    case Storage::bfloat16:
      return fetch_as(held, static_cast<const __nv_bfloat16*>(from.data) + at, place_stride, depth_stride,
                      places, depths, thread);
    case Storage::float16:
      return fetch_as(held, static_cast<const __half*>(from.data) + at, place_stride, depth_stride, places,
                      depths, thread);
  }
}

__device__ __forceinline__ void put(float* slab, const float (&held)[kHeld], bool along_depth, int thread) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    int i, k;
    place_of(j, thread, along_depth, i, k);
    slab[k * kPitch + i] = held[j];
  }
}

// grid blocks_of(first) + blocks_of(second), block kThreads. A thread has two rows of four columns.
__global__ void __launch_bounds__(kThreads) multiply(Pair pair) {
  FASTSSL_SHARED(float4, left_quads, kSlab * kPitch / 4);
  FASTSSL_SHARED(float4, right_quads, kSlab * kPitch / 4);
  float* const left = reinterpret_cast<float*>(left_quads);
  float* const right = reinterpret_cast<float*>(right_quads);
  const int thread = threadIdx.x;
  int64_t block = blockIdx.x;
  const bool is_first = block < blocks_of(pair.first);
  if (!is_first) block -= blocks_of(pair.first);
  const Product& p = is_first ? pair.first : pair.second;
  const int64_t across = tiles_along(p.columns), down = tiles_along(p.rows);
  const int column = static_cast<int>(block % across) * kTile;
  const int row = static_cast<int>(block / across % down) * kTile;
  const int64_t batch = block / (across * down);
  const int64_t left_at = batch * p.left.batch + row * p.left.row;
  const int64_t right_at = batch * p.right.batch + column * p.right.column;
  const bool left_along = p.left.column <= p.left.row, right_along = p.right.row <= p.right.column;

  float held_left[kHeld], held_right[kHeld];
  const auto fetch_slab = [&](int k) {
    fetch(held_left, p.left, left_at + k * p.left.column, p.left.row, p.left.column, p.rows - row,
          p.depth - k, thread);
    fetch(held_right, p.right, right_at + k * p.right.row, p.right.column, p.right.row, p.columns - column,
          p.depth - k, thread);
  };
  float sums[2][4] = {};
  const int my_row = thread / 8 * 2, my_column = thread % 8 * 4;
  fetch_slab(0);
  for (int k = 0; k < p.depth; k += kSlab) {
    put(left, held_left, left_along, thread);
    put(right, held_right, right_along, thread);
    __syncthreads();
    if (k + kSlab < p.depth) fetch_slab(k + kSlab);
#pragma unroll 8
    for (int i = 0; i < kSlab; ++i) {
      const float4 b = right_quads[(i * kPitch + my_column) / 4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = left[i * kPitch + my_row + r];
        sums[r][0] += a * b.x;
        sums[r][1] += a * b.y;
        sums[r][2] += a * b.z;
        sums[r][3] += a * b.w;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t i = row + my_row + r, j = column + my_column + c;
      if (i >= p.rows || j >= p.columns) continue;
      float v = sums[r][c];
      if (p.bias.data != nullptr)
        v += load_float(p.bias.data, p.bias.storage, batch * p.bias.batch + j * p.bias.column);
      store_float(p.out.data, p.out.storage, batch * p.out.batch + i * p.out.row + j * p.out.column, v);
    }
  }
}

}  // namespace fastssl::cuda::products
