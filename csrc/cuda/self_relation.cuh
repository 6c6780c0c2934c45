// self_relation, forward: softmax over the last axis of scale/temp · X Yᵀ for one (image, head) per block.
//
// A pixel relation takes tokens as vectors (R = N rows, M columns, depth K = d), a channel relation the
// channels of the head (R = M = d, K = N). Only strides tell them apart, so one kernel serves both, and
// feature maps too.
//
// The block lays the head's M column vectors into shared memory once, as float32. Each warp then takes kRows
// rows at a time: lane l holds the products of these rows with columns l, l + 32, … in registers, kRows ×
// kSlots of them. Per four depths the warp's reads keep shared memory busy for 4·kSlots + kRows = 40 cycles
// (a row is one broadcast), its products the arithmetic units for kRows·kSlots = 64, so arithmetic decides.
// Up to kWidth columns a row is complete in registers: one pass. Longer rows take two passes over the Gram
// tiles, the first for the row's maximum and sum, the second to write; nothing is staged, and no register
// array is indexed at run time.
#pragma once

#include <cfloat>
#include <cstddef>

#include "common.cuh"

namespace fastssl::cuda::self_relation {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 3;  // blocks per multiprocessor: leaves a thread 168 registers, which hold the tile
constexpr int kRows = 8;      // rows of a warp's register tile
constexpr int kSlots = 8;     // columns of it per lane
constexpr int kWidth = kSlots * kWarp;

// Distances in elements between neighbours along each axis of the related vectors.
struct Strides {
  int64_t image, head, vector, depth;
};

using cuda::Storage;  // how the columns are stored, a run-time choice

struct Problem {
  int rows;            // R
  int columns, depth;  // M, K
  int heads;           // H
  float scale;         // scale/temp · log2(e)
  bool normalize;      // each vector over its length; one with squared length <= 1e-24 becomes zero
  bool symmetric;      // the rows are the columns, so they are read from shared memory
  Storage y_storage;
  Strides x, y;
};

// A call as a problem. x is (B, N, C) and y (B, M, C), or x itself if symmetric, given by sizes and by
// strides in elements. Pixels relate tokens of depth C/H, channels the head's channels of depth N. exp(s·g)
// becomes exp2(p.scale·g). Rows and columns of one head are counted in 32 bits, every offset in 64.
inline Problem describe(const int64_t* x_sizes, const int64_t* x_strides, const int64_t* y_sizes,
                        const int64_t* y_strides, Storage y_storage, bool channel, int64_t heads,
                        double scale, bool normalize, bool symmetric) {
  const int64_t width = x_sizes[2] / heads;
  const auto vectors = [&](const int64_t* strides) {
    return Strides{strides[0], width * strides[2], strides[channel ? 2 : 1], strides[channel ? 1 : 2]};
  };
  Problem p;
  p.rows = static_cast<int>(channel ? width : x_sizes[1]);
  p.columns = static_cast<int>(channel ? width : y_sizes[1]);
  p.depth = static_cast<int>(channel ? x_sizes[1] : width);
  p.heads = static_cast<int>(heads);
  p.scale = static_cast<float>(scale * 1.4426950408889634);
  p.normalize = normalize;
  p.symmetric = symmetric;
  p.y_storage = y_storage;
  p.x = vectors(x_strides);
  p.y = vectors(y_strides);
  return p;
}

// Shared memory holds vectors as quads of float32, this many quads apart. An odd distance puts the eight
// 16-byte accesses that are served together into different banks.
__host__ __device__ constexpr int quads_apart(int depth) { return (depth + 3) / 4 | 1; }

// Vectors in shared memory: the columns, up to whole row tiles where they are the rows too, else followed by
// the rows that each warp works on.
__host__ __device__ constexpr int columns_held(int columns, bool symmetric) {
  return symmetric ? (columns + kRows - 1) / kRows * kRows : columns;
}

// Dynamic shared memory of a block, in bytes. fastssl/ops/self_relation.py repeats this formula
// (cuda_shared_bytes).
__host__ __device__ constexpr size_t shared_bytes(int columns, int depth, bool symmetric) {
  return sizeof(float4) * (size_t{0} + columns_held(columns, symmetric) + (symmetric ? 0 : kWarps * kRows)) *
         quads_apart(depth);
}

// Into how many blocks (gridDim.y) the rows of one head are split: more than one only where there are too few
// pairs (image, head) to give every multiprocessor its blocks, since each block loads the columns again.
inline unsigned row_splits(int64_t pairs, int64_t rows, int multiprocessors) {
  const int64_t useful = (rows + kRows * kWarps - 1) / (kRows * kWarps);
  const int64_t wanted = (int64_t{kResident} * multiprocessors + pairs - 1) / pairs;
  const int64_t splits = pairs < multiprocessors ? (wanted < useful ? wanted : useful) : 1;
  return static_cast<unsigned>(splits < 1 ? 1 : splits > 65535 ? 65535 : splits);
}

// One vector's depths 4q … 4q + 3, zero from `depth` on. No branch, so that loads of several quads overlap.
template <bool Whole, class T>
__device__ __forceinline__ Quad<T> quad_of(const T* vector, int64_t stride, int q, int depth) {
  if constexpr (Whole) {
    return *reinterpret_cast<const Quad<T>*>(vector + 4 * q);
  } else {
    Quad<T> quad;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const T value = vector[min(4 * q + e, depth - 1) * stride];
      quad.at[e] = 4 * q + e < depth ? value : from_float<T>(0.f);
    }
    return quad;
  }
}

// Copies vectors first … first + count - 1 into shared memory as float32; past `limit` the last one is
// repeated, so that the tiles need no masks. Neighbouring threads take neighbours in memory: quads of a
// vector, or vectors.
template <bool Whole, int Batch, class T>
__device__ __forceinline__ void copy_vectors(float4* shared,   // (count, quads_apart(K))
                                             const T* source,  // (limit, K) at strides.vector, strides.depth
                                             const Strides& strides, int first, int count, int limit,
                                             int depth, int thread, int threads) {
  const int quads = (depth + 3) / 4, apart = quads_apart(depth);
  const bool along_depth = Whole || strides.depth <= strides.vector;
  const int outer = along_depth ? count : quads, inner = along_depth ? quads : count;
  if (inner == 0) return;
  const int outer_step = threads / inner, inner_step = threads % inner;  // one division, not one per item
  int i = thread / inner, k = thread % inner;
  while (i < outer) {
    Quad<T> quad[Batch];
    int at[Batch];
#pragma unroll
    for (int u = 0; u < Batch; ++u) {
      const bool inside = i < outer;
      const int v = !inside ? 0 : along_depth ? i : k, q = !inside ? 0 : along_depth ? k : i;
      const int64_t vector = min(first + v, limit - 1);
      quad[u] = quad_of<Whole>(source + vector * strides.vector, strides.depth, q, depth);
      at[u] = inside ? v * apart + q : -1;
      i += outer_step;
      k += inner_step;
      if (k >= inner) {
        k -= inner;
        ++i;
      }
    }
#pragma unroll
    for (int u = 0; u < Batch; ++u) {
      if (at[u] >= 0) shared[at[u]] = to_float4(quad[u]);
    }
  }
}

// The same, with whole quads in one access where every one of them is contiguous and aligned.
template <int Batch, class T>
__device__ __forceinline__ void load_vectors(float4* shared,   // (count, quads_apart(K))
                                             const T* source,  // (limit, K) at strides.vector, strides.depth
                                             const Strides& strides, int first, int count, int limit,
                                             int depth, int thread, int threads) {
  const bool whole = depth % 4 == 0 && strides.depth == 1 && strides.vector % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(source) % (4 * sizeof(T)) == 0;
  if (whole) {
    copy_vectors<true, Batch>(shared, source, strides, first, count, limit, depth, thread, threads);
  } else {
    copy_vectors<false, Batch / 2>(shared, source, strides, first, count, limit, depth, thread, threads);
  }
}

// Divides vectors first, first + step, … below count by their lengths, one vector per warp at a time.
__device__ __forceinline__ void normalize_vectors(float4* shared,  // (count, quads_apart(K))
                                                  int first, int step, int count, int depth, int lane) {
  const int quads = (depth + 3) / 4;
  for (int v = first; v < count; v += step) {
    float4* vector = shared + v * quads_apart(depth);
    float squared = 0.f;
    for (int q = lane; q < quads; q += kWarp) {
      const float4 a = vector[q];
      squared += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
    }
    squared = warp_sum(squared);
    const bool alive = squared > 1e-24f;
    const float inverse = rsqrtf(squared);
    for (int q = lane; q < quads; q += kWarp) {
      const float4 a = vector[q];
      vector[q] = alive ? make_float4(a.x * inverse, a.y * inverse, a.z * inverse, a.w * inverse)
                        : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
}

// products[r][j] = row r · column j for the first Slots columns of the lane. Positions are in quads.
template <int Slots>
__device__ __forceinline__ void gram(float (&products)[kRows][kSlots], const float4* shared, int row_at,
                                     int column, int last_column, int apart, int quads) {
  int column_at[Slots];
#pragma unroll
  for (int j = 0; j < Slots; ++j) column_at[j] = min(column + j * kWarp, last_column) * apart;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < Slots; ++j) products[r][j] = 0.f;
  }
#pragma unroll 1
  for (int q = 0; q < quads; ++q) {
    float4 a[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) a[r] = shared[row_at + r * apart + q];
#pragma unroll
    for (int j = 0; j < Slots; ++j) {
      const float4 b = shared[column_at[j] + q];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        products[r][j] += a[r].x * b.x;
        products[r][j] += a[r].y * b.y;
        products[r][j] += a[r].z * b.z;
        products[r][j] += a[r].w * b.w;
      }
    }
  }
}

// The same for a number of slots known at run time, the same in the whole warp. Only whole tiles are indexed.
template <int Slots>
__device__ __forceinline__ void gram_of(int slots, float (&products)[kRows][kSlots], const float4* shared,
                                        int row_at, int column, int last_column, int apart, int quads) {
  if constexpr (Slots > 1) {
    if (slots < Slots) {
      gram_of<Slots - 1>(slots, products, shared, row_at, column, last_column, apart, quads);
      return;
    }
  }
  gram<Slots>(products, shared, row_at, column, last_column, apart, quads);
}

// Calls f(j) for the slots in use; j is a constant in each unrolled turn, the test the same in the whole
// warp.
template <class F>
__device__ __forceinline__ void for_slots(int slots, const F& f) {
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    if (j < slots) f(j);
  }
}

// grid (B·H, row splits), block kThreads, dynamic shared memory shared_bytes(M, K, symmetric).
template <class X>
__global__ void __launch_bounds__(kThreads, kResident)
    forward(Problem problem,
            const X* __restrict__ x,     // R vectors of depth K per (image, head), at problem.x
            const void* __restrict__ y,  // M vectors of depth K per (image, head), at problem.y
            X* __restrict__ out) {       // (B, H, R, M), contiguous
  FASTSSL_DYNAMIC_SHARED(float4, shared);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int pair = blockIdx.x;
  const int64_t image = pair / problem.heads, head = pair % problem.heads;
  const int rows = problem.rows, columns = problem.columns, depth = problem.depth;
  const int quads = (depth + 3) / 4, apart = quads_apart(depth);
  const int stage_at = (columns + warp * kRows) * apart;  // where this warp keeps its rows, unless symmetric
  x += image * problem.x.image + head * problem.x.head;
  const int64_t y_at = image * problem.y.image + head * problem.y.head;
  out += int64_t{pair} * rows * columns;

  const int held = columns_held(columns, problem.symmetric);
  const auto load_columns = [&](const auto* source) {
    load_vectors<8>(shared, source + y_at, problem.y, 0, held, columns, depth, thread, kThreads);
  };
  switch (problem.y_storage) {
    case Storage::float32:
      load_columns(static_cast<const float*>(y));
      break;
    case Storage::bfloat16:
      load_columns(static_cast<const __nv_bfloat16*>(y));
      break;
    case Storage::float16:
      load_columns(static_cast<const __half*>(y));
      break;
  }
  __syncthreads();
  if (problem.normalize) {
    normalize_vectors(shared, warp, kWarps, held, depth, lane);
    __syncthreads();
  }

  const int step = kRows * kWarps * gridDim.y;
  for (int row = kRows * (blockIdx.y * kWarps + warp); row < rows; row += step) {
    int row_at = row * apart;
    if (!problem.symmetric) {
      row_at = stage_at;
      __syncwarp();  // the rows of the turn before have been read
      load_vectors<4>(shared + stage_at, x, problem.x, row, kRows, rows, depth, lane, kWarp);
      __syncwarp();
      if (problem.normalize) {
        normalize_vectors(shared + stage_at, 0, 1, kRows, depth, lane);
        __syncwarp();
      }
    }
    float products[kRows][kSlots];
    // Maximum and sum of row r live in lane r. A finite start turns a logit of -inf into 0, not NaN.
    float top = -FLT_MAX, sum = 0.f;
    const int passes = columns <= kWidth ? 1 : 2;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int first = lane; first - lane < columns; first += kWidth) {
        const int slots = min((columns - (first - lane) + kWarp - 1) / kWarp, kSlots);
        gram_of<kSlots>(slots, products, shared, row_at, first, columns - 1, apart, quads);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          for_slots(slots, [&](int j) {
            products[r][j] = first + j * kWarp < columns ? products[r][j] * problem.scale : -INFINITY;
          });
          const float before = __shfl_sync(kFullMask, top, r);
          float peak = before;
          if (pass == 0) {
            for_slots(slots, [&](int j) { peak = fmaxf(peak, products[r][j]); });
            peak = warp_max(peak);
          }
          float part = 0.f;
          for_slots(slots, [&](int j) {
            products[r][j] = exp2f(products[r][j] - peak);
            part += products[r][j];
          });
          if (pass == 0) {
            part = warp_sum(part);
            if (lane == r) {
              sum = sum * exp2f(before - peak) + part;
              top = peak;
            }
          }
          if (pass == passes - 1 && row + r < rows) {
            const float inverse = 1.f / __shfl_sync(kFullMask, sum, r);
            X* const line = out + int64_t{row + r} * columns;
            for_slots(slots, [&](int j) {
              if (first + j * kWarp < columns)
                line[first + j * kWarp] = from_float<X>(products[r][j] * inverse);
            });
          }
        }
      }
    }
  }
}

}  // namespace fastssl::cuda::self_relation
