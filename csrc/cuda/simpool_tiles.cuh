// simpool's common ground: the shape of a call, tiles of tokens in shared memory, sums over a block, and the
// last block that gathers what the others left. Device code only, no torch headers.
//
// A block takes a chunk of one image's tokens, tile by tile. It lays a tile into shared memory as it is
// stored, whatever the strides, with loads of 16 bytes where tokens are contiguous, and along the tokens
// where they are not (feature maps). From there warps read tokens (sums over channels) and threads read
// channels (sums over tokens), so that x comes from memory once per kernel. The sums over a chunk's tokens
// lie in a workspace; the last block of an image to finish adds them up in the order of the chunks, whichever
// block that is. An image is split only as far as it takes to fill the multiprocessors: with many images
// there is one chunk, and nothing to wait for. A cluster per image would save the workspace on sm_90, but not
// on sm_80, and its size would cap the split of long images.
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "common.cuh"

namespace fastssl::cuda::simpool {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxTile = kWarp;                      // tokens of a tile: a warp holds one number of each
constexpr int kMaxChannels = 4096, kMaxHeads = 128;  // what surely fits into shared memory

// Distances in elements.
struct Strides {
  int64_t image = 0, token = 0, channel = 0;
};

// A vector of any storage type, or none.
struct Values {
  const void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t stride = 0;
  __device__ __forceinline__ float at(int64_t i) const { return load_float(data, storage, i * stride); }
};

struct Shape {
  int64_t images = 0;
  int tokens = 0, channels = 0, heads = 0;
  int tile = 0;               // tokens in shared memory at a time
  int chunk = 0, chunks = 0;  // tokens of a block, blocks of an image
};

__host__ __device__ constexpr int round_up(int v, int unit) { return (v + unit - 1) / unit * unit; }

// Per-channel arrays in shared memory are whole quads. A token starts at an odd multiple of 16 bytes, so that
// tokens next to each other do not start in the same bank.
__host__ __device__ constexpr int padded(int channels) { return round_up(channels, 4); }
__host__ __device__ constexpr int pitch_of(int channels, int element_bytes) {
  return (round_up(channels * element_bytes, 16) / 16 | 1) * 16 / element_bytes;
}
__host__ __device__ constexpr int padded_tile(int tile) { return round_up(tile, 8); }

// The tokens of a block: first … end - 1 of `image`.
struct Place {
  int64_t image;
  int chunk, first, end;
};
__device__ __forceinline__ Place place_of(const Shape& s) {
  Place at;
  at.image = blockIdx.x / static_cast<unsigned>(s.chunks);
  at.chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(s.chunks));
  at.first = at.chunk * s.chunk;
  at.end = min(at.first + s.chunk, s.tokens);
  return at;
}

// Calls f(i, k) for every i < outer, k < inner, neighbouring k in neighbouring threads.
template <class F>
__device__ __forceinline__ void for_units(int outer, int inner, const F& f) {
  const int outer_step = kThreads / inner, inner_step = kThreads % inner;  // one division, not one per item
  int i = threadIdx.x / inner, k = threadIdx.x % inner;
  while (i < outer) {
    f(i, k);
    i += outer_step;
    k += inner_step;
    if (k >= inner) {
      k -= inner;
      ++i;
    }
  }
}

// put(to(i, k), load(i, k)) for the same, `Batch` loads in flight at a time. `to` gives a place in the tile.
template <int Batch, class Load, class To, class Put>
__device__ __forceinline__ void copy_units(int outer, int inner, const Load& load, const To& to,
                                           const Put& put) {
  const int outer_step = kThreads / inner, inner_step = kThreads % inner;
  int i = threadIdx.x / inner, k = threadIdx.x % inner;
  while (i < outer) {
    decltype(load(0, 0)) held[Batch];
    int at[Batch];
#pragma unroll
    for (int u = 0; u < Batch; ++u) {
      const bool inside = i < outer;  // no branch, so that loads overlap
      at[u] = inside ? to(i, k) : -1;
      held[u] = load(inside ? i : 0, inside ? k : 0);
      i += outer_step;
      k += inner_step;
      if (k >= inner) {
        k -= inner;
        ++i;
      }
    }
#pragma unroll
    for (int u = 0; u < Batch; ++u) {
      if (at[u] >= 0) put(at[u], held[u]);
    }
  }
}

// 16 bytes, and the channels of one 4-byte word: what a thread of a column sum takes, without bank conflicts.
template <class T>
struct alignas(16) Vector {
  T at[16 / sizeof(T)];
};
template <class T>
struct alignas(4) Word {
  T at[4 / sizeof(T)];
};

template <class X>
__device__ __forceinline__ bool whole_vectors(const X* x, const Strides& strides, int channels) {
  constexpr int vector = 16 / sizeof(X);
  return strides.channel == 1 && strides.token % vector == 0 && channels % vector == 0 &&
         reinterpret_cast<uintptr_t>(x) % 16 == 0;
}
template <class X>
__device__ __forceinline__ bool quads_of_tokens(const X* x, const Strides& strides, int count) {
  return strides.token == 1 && strides.channel % 4 == 0 && count % 4 == 0 &&
         reinterpret_cast<uintptr_t>(x) % (4 * sizeof(X)) == 0;
}

// Copies `count` tokens from x into the tile, zeros after the last channel. All threads of the block.
template <class X>
__device__ __forceinline__ void load_tile(X* tile,     // (count, pitch)
                                          const X* x,  // the first of the tokens
                                          const Strides& strides, int count, int channels) {
  const int pitch = pitch_of(channels, sizeof(X));
  if (whole_vectors(x, strides, channels)) {
    constexpr int vector = 16 / sizeof(X);
    copy_units<4>(
        count, channels / vector,
        [&](int n, int v) { return *reinterpret_cast<const Vector<X>*>(x + n * strides.token + v * vector); },
        [&](int n, int v) { return n * pitch + v * vector; },
        [&](int at, const Vector<X>& held) { *reinterpret_cast<Vector<X>*>(tile + at) = held; });
    return;
  }
  const auto one = [&](int n, int c) { return x[n * strides.token + c * strides.channel]; };
  const auto put = [&](int at, X held) { tile[at] = held; };
  if (quads_of_tokens(x, strides, count)) {
    copy_units<4>(
        channels, count / 4,
        [&](int c, int q) { return *reinterpret_cast<const Quad<X>*>(x + c * strides.channel + 4 * q); },
        [&](int c, int q) { return 4 * q * pitch + c; },
        [&](int at, const Quad<X>& held) {
#pragma unroll
          for (int e = 0; e < 4; ++e) tile[at + e * pitch] = held.at[e];
        });
  } else if (strides.token < strides.channel) {
    copy_units<sizeof(X) == 4 ? 4 : 8>(
        channels, count, [&](int c, int n) { return one(n, c); }, [&](int c, int n) { return n * pitch + c; },
        put);
  } else {
    copy_units<sizeof(X) == 4 ? 4 : 8>(
        count, channels, one, [&](int n, int c) { return n * pitch + c; }, put);
  }
  if (channels % 4 != 0) {
    for_units(count, padded(channels) - channels,
              [&](int n, int c) { tile[n * pitch + channels + c] = from_float<X>(0.f); });
  }
}

// The way back.
template <class X>
__device__ __forceinline__ void store_tile(const X* tile,  // (count, pitch)
                                           X* x,           // the first of the tokens
                                           const Strides& strides, int count, int channels) {
  const int pitch = pitch_of(channels, sizeof(X));
  if (whole_vectors(x, strides, channels)) {
    constexpr int vector = 16 / sizeof(X);
    for_units(count, channels / vector, [&](int n, int v) {
      *reinterpret_cast<Vector<X>*>(x + n * strides.token + v * vector) =
          *reinterpret_cast<const Vector<X>*>(tile + n * pitch + v * vector);
    });
    return;
  }
  const auto copy = [&](int n, int c) { x[n * strides.token + c * strides.channel] = tile[n * pitch + c]; };
  if (quads_of_tokens(x, strides, count)) {
    for_units(channels, count / 4, [&](int c, int q) {
      Quad<X> quad;
#pragma unroll
      for (int e = 0; e < 4; ++e) quad.at[e] = tile[(4 * q + e) * pitch + c];
      *reinterpret_cast<Quad<X>*>(x + c * strides.channel + 4 * q) = quad;
    });
  } else if (strides.token < strides.channel) {
    for_units(channels, count, [&](int c, int n) { copy(n, c); });
  } else {
    for_units(count, channels, copy);
  }
}

// Whether a value is the minimum is decided by equality of bits, in several kernels: these two roundings and
// one fused multiply-add are the only way in which they make y.
__device__ __forceinline__ float standardized(float x, float mean, float inverse) {
  return __fmul_rn(__fsub_rn(x, mean), inverse);
}
__device__ __forceinline__ float affine(float x_hat, float weight, float bias) {
  return fmaf(x_hat, weight, bias);
}

// v^(gamma - 1) for v > 0; times v it is v^gamma, so one exponential serves both.
__device__ __forceinline__ float slope(float v, float gamma_minus_one) {
  return exp2f(gamma_minus_one * log2f(v));
}

// Sum and minimum over the block, the same bits in every thread; all threads call.
__device__ __forceinline__ float block_sum(float v) {
  FASTSSL_SHARED(float, parts, kWarps);
  v = warp_sum(v);
  __syncthreads();  // the parts of a call before have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  return sum;
}
__device__ __forceinline__ float block_min(float v) {
  FASTSSL_SHARED(float, parts, kWarps);
  v = -warp_max(-v);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = v;
  __syncthreads();
  float low = parts[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) low = fminf(low, parts[w]);
  return low;
}

// True in the last of `count` blocks to come here, which may then read, with __ldcg, what all of them have
// written. The counter starts at zero. All threads of the block call.
__device__ __forceinline__ bool last_block(unsigned* counter, unsigned count) {
  FASTSSL_SHARED(int, is_last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = count == 1 || atomicAdd(counter, 1u) == count - 1;
  __syncthreads();
  __threadfence();
  return is_last[0] != 0;
}

// Dynamic shared memory of each kernel, in bytes.
__host__ __device__ constexpr int heads_held(int channels, int heads) {
  const int fit = 4096 / padded(channels);
  return fit < 1 ? 1 : fit < heads ? fit : heads;
}
constexpr size_t tile_bytes(int tile, int channels, int element_bytes) {
  return size_t{1} * tile * pitch_of(channels, element_bytes) * element_bytes;
}
constexpr size_t statistics_bytes(int tile, int channels, int element_bytes) {
  return tile_bytes(tile, channels, element_bytes) + sizeof(float) * 2 * padded_tile(tile);
}
constexpr size_t pool_bytes(int tile, int channels, int heads, int element_bytes) {
  const size_t rows = padded_tile(tile);
  return tile_bytes(tile, channels, element_bytes) +
         sizeof(float) * (size_t{1} * heads_held(channels, heads) * padded(channels) + heads * rows +
                          2 * rows + 3 * heads);
}
constexpr size_t token_gradients_bytes(int tile, int channels, int heads, int element_bytes, bool power) {
  const size_t rows = padded_tile(tile);
  return tile_bytes(tile, channels, element_bytes) +
         sizeof(float) *
             (size_t{1} * (power ? 4 : 1) * padded(channels) + 2 * heads * rows + 2 * rows + 2 * heads);
}
constexpr size_t input_gradients_bytes(int tile, int channels, int heads, int element_bytes, bool power) {
  const size_t rows = padded_tile(tile);
  return tile_bytes(tile, channels, element_bytes) +
         sizeof(float) * (size_t{1} * (power ? 4 : 0) * padded(channels) + 2 * heads * rows + 4 * rows);
}
constexpr size_t largest_bytes(int tile, int channels, int heads, int element_bytes, bool power) {
  const size_t a = pool_bytes(tile, channels, heads, element_bytes);
  const size_t b = token_gradients_bytes(tile, channels, heads, element_bytes, power);
  const size_t c = input_gradients_bytes(tile, channels, heads, element_bytes, power);
  return a > b ? (a > c ? a : c) : b > c ? b : c;
}

constexpr size_t kSharedWanted = 56 * 1024;  // four blocks of a multiprocessor of sm_90 and sm_100
constexpr size_t kSharedLimit = 99 * 1024;   // what every GPU from sm_80 on gives one block

// Splits tokens into tiles and chunks. Tiles of whole eights: one token per warp, whole sectors of a feature
// map's rows. `tile` stays 0 where not even one token fits.
inline Shape split(int64_t images, int64_t tokens, int64_t channels, int64_t heads, int element_bytes,
                   bool power, int multiprocessors) {
  Shape s;
  s.images = images;
  s.tokens = static_cast<int>(tokens);
  s.channels = static_cast<int>(channels);
  s.heads = static_cast<int>(heads);
  for (const int tile : {32, 24, 16, 8, 4, 2, 1}) {
    const size_t bytes = largest_bytes(tile, s.channels, s.heads, element_bytes, power);
    if (s.tile == 0 && bytes <= (tile > 8 ? kSharedWanted : kSharedLimit)) s.tile = tile;
  }
  if (s.tile == 0 || images == 0) return s;
  // Chunks for four blocks per multiprocessor, each of a token per warp at least.
  int64_t chunks = (int64_t{4} * multiprocessors + images - 1) / images;
  const int64_t most = (tokens + kWarps - 1) / kWarps;
  chunks = chunks < 1 ? 1 : chunks < most ? chunks : most;
  const int64_t chunk = (tokens + chunks - 1) / chunks;
  // Tiles of one size.
  const int64_t tiles = (chunk + s.tile - 1) / s.tile;
  if (s.tile >= 8) s.tile = round_up(static_cast<int>((chunk + tiles - 1) / tiles), 8);
  s.chunk = static_cast<int>(tiles * s.tile);
  s.chunks = static_cast<int>((tokens + s.chunk - 1) / s.chunk);
  return s;
}

}  // namespace fastssl::cuda::simpool
