// What device code calls, on the CPU: barriers, shuffles and votes, fences and counters, and the
// half-precision types. Included by cuda_on_cpu.h, whose scheduler lets the threads wait for each other.
#pragma once

// Where an operation stands in the source: default arguments take the caller's line.
#define FASTSSL_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FASTSSL_HERE) {
  cuda_on_cpu::wait({cuda_on_cpu::State::barrier, cuda_on_cpu::Kind::sync, 0, 0, 0, file, line});
}
inline void __syncwarp(unsigned mask = ~0u, FASTSSL_HERE) {
  cuda_on_cpu::wait({cuda_on_cpu::State::warp, cuda_on_cpu::Kind::sync, mask, 0, 0, file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, FASTSSL_HERE) {
  return cuda_on_cpu::shuffle(mask, v, cuda_on_cpu::lane_id() / width * width + lane % width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, FASTSSL_HERE) {
  const int self = cuda_on_cpu::lane_id(), lane = self ^ bits;
  return cuda_on_cpu::shuffle(mask, v, lane < self / width * width + width ? lane : self, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, FASTSSL_HERE) {
  const int self = cuda_on_cpu::lane_id(), lane = self - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, v, lane >= self / width * width ? lane : self, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, FASTSSL_HERE) {
  const int self = cuda_on_cpu::lane_id(), lane = self + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, v, lane < self / width * width + width ? lane : self, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool yes, FASTSSL_HERE) {
  return cuda_on_cpu::vote(mask, yes, file, line);
}
inline bool __any_sync(unsigned mask, bool yes, FASTSSL_HERE) {
  return cuda_on_cpu::vote(mask, yes, file, line) != 0;
}
inline bool __all_sync(unsigned mask, bool yes, FASTSSL_HERE) {
  return cuda_on_cpu::vote(mask, !yes, file, line) == 0;
}

// Blocks run one after the other, so what one wrote the next one sees.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned v) {
  const unsigned before = *address;
  *address += v;
  return before;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(fraction + 1024), exponent - 25);
  return v.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float size = std::fabs(f);
  if (f != f) return {0x7fff};
  if (size == 0.f) return {sign};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // One unit in the last place is 2^(exponent - 11); lrint rounds to even, and a carry moves into the
  // exponent.
  int exponent;
  std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);
  const int units = static_cast<int>(std::lrint(std::ldexp(size, 11 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + units))};
}
