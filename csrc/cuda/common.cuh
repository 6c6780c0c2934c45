// Shared ground of the CUDA kernels: storage types to float and back, four elements at once, warp reductions,
// and dynamic shared memory. Device code only, no torch headers. tests/cuda_on_cpu.h, included first, lets
// g++ compile and run the same source.
#pragma once

#ifndef FASTSSL_CUDA_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Shared memory of the block: `FASTSSL_DYNAMIC_SHARED(float4, name);` for what the launch asks for, one
// symbol of one type, since `extern __shared__` arrays of different types clash between instantiations, and
// `FASTSSL_SHARED(float, name, 32);` for what is known at compile time.
#define FASTSSL_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char fastssl_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fastssl_dynamic_shared)
#define FASTSSL_SHARED(type, name, count) __shared__ type name[count]
#endif

#include <cstdint>

namespace fastssl::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Intrinsics, because PyTorch's nvcc flags switch the operators and implicit conversions of these types off.
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// Four neighbours, loaded in one access from where p is aligned to four elements.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};
template <class T>
__device__ __forceinline__ float4 to_float4(const Quad<T>& quad) {
  return make_float4(to_float(quad.at[0]), to_float(quad.at[1]), to_float(quad.at[2]), to_float(quad.at[3]));
}

// How a tensor is stored, where that is a run-time choice: it matters only while elements are loaded or
// stored, and kernels of one type build faster than those of every combination.
enum class Storage : int { float32, bfloat16, float16 };

__device__ __forceinline__ float load_float(const void* data, Storage storage, int64_t i) {
  if (storage == Storage::float32) return static_cast<const float*>(data)[i];
  if (storage == Storage::bfloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
  return to_float(static_cast<const __half*>(data)[i]);
}
__device__ __forceinline__ void store_float(void* data, Storage storage, int64_t i, float v) {
  if (storage == Storage::float32) {
    static_cast<float*>(data)[i] = v;
  } else if (storage == Storage::bfloat16) {
    static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(v);
  } else {
    static_cast<__half*>(data)[i] = from_float<__half>(v);
  }
}

// Largest value and sum over the warp, the same bits in every lane (a butterfly adds the same pairs
// everywhere).
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, lane));
  return v;
}
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(kFullMask, v, lane);
  return v;
}

}  // namespace fastssl::cuda
