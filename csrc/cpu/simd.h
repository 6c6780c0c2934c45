// Vectors of one instruction set, on the compiler's vector extensions: arithmetic, loads of every element
// type, exp2 and in-register transposition. Included once per instruction set by foreach_isa.h.

namespace fastssl::cpu::FASTSSL_ISA {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(FASTSSL_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FASTSSL_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FASTSSL_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(FASTSSL_VECTOR_BYTES / 2)));
  static constexpr int kWidth = FASTSSL_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(FASTSSL_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FASTSSL_VECTOR_BYTES)));
  static constexpr int kWidth = FASTSSL_VECTOR_BYTES / 8;
};
template <class T>
using Vec = typename Simd<T>::V;

#define FASTSSL_INLINE inline __attribute__((always_inline))

template <class To, class From>
FASTSSL_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
FASTSSL_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x - 0 is x, so this is a plain broadcast
}
template <class T>
FASTSSL_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
// Halves change places until one lane holds all: log2(W) steps instead of W.
template <class T, int S, int... L>
FASTSSL_INLINE Vec<T> rotated(Vec<T> v, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(v, v, ((L + S) % Simd<T>::kWidth)...);
}
template <class T, int S = Simd<T>::kWidth / 2>
FASTSSL_INLINE T sum_lanes(Vec<T> v) {
  v += rotated<T, S>(v, std::make_integer_sequence<int, Simd<T>::kWidth>());
  if constexpr (S > 1) return sum_lanes<T, S / 2>(v);
  return v[0];
}
template <class T, int S = Simd<T>::kWidth / 2>
FASTSSL_INLINE T max_lanes(Vec<T> v) {
  v = max<T>(v, rotated<T, S>(v, std::make_integer_sequence<int, Simd<T>::kWidth>()));
  if constexpr (S > 1) return max_lanes<T, S / 2>(v);
  return v[0];
}
// The first `count` lanes of a, then those of b.
template <class T>
FASTSSL_INLINE Vec<T> join_lanes(Vec<T> a, Vec<T> b, int64_t count) {
  using I = typename Simd<T>::I;
  I lane;
  for (int l = 0; l < Simd<T>::kWidth; ++l) lane[l] = l;
  return lane < I{} + static_cast<decltype(lane[0] + 0)>(count) ? a : b;
}
// The first `count` lanes of v, then `rest`.
template <class T>
FASTSSL_INLINE Vec<T> keep_lanes(Vec<T> v, int64_t count, T rest) {
  return join_lanes<T>(v, broadcast<T>(rest), count);
}

// ---- element types -> T
// ----------------------------------------------------------------------------------------

template <class T>
FASTSSL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
FASTSSL_INLINE Simd<float>::U widen(const uint16_t* p) {
  Simd<float>::Half narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, Simd<float>::U);
}
template <class T>
FASTSSL_INLINE Vec<float> load(const BFloat16Bits* p) {
  static_assert(sizeof(T) == 4);
  return bits_as<Vec<float>>(widen(&p->bits) << 16);
}
// Exponent and mantissa move up by 13 bits; the factor 2^112 corrects the exponent's bias, also for
// subnormals.
template <class T>
FASTSSL_INLINE Vec<float> load(const HalfBits* p) {
  static_assert(sizeof(T) == 4);
  using U = Simd<float>::U;
  const U bits = widen(&p->bits);
  const U magnitude = (bits & 0x7fffu) << 13;
  U result = bits_as<U>(bits_as<Vec<float>>(magnitude) * 0x1p112f);
  result |= magnitude >= U{} + (0x7c00u << 13) ? U{} + 0x7f800000u : U{};  // infinity and NaN
  return bits_as<Vec<float>>(result | ((bits & 0x8000u) << 16));
}

FASTSSL_INLINE float widen_one(BFloat16Bits x) { return bits_as<float>(uint32_t{x.bits} << 16); }
FASTSSL_INLINE float widen_one(HalfBits x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t result = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  if (magnitude >= (0x7c00u << 13)) result |= 0x7f800000u;
  return bits_as<float>(result | ((x.bits & 0x8000u) << 16));
}
FASTSSL_INLINE float widen_one(float x) { return x; }
FASTSSL_INLINE double widen_one(double x) { return x; }

// double computations read every other type one element at a time: they exist for exactness, not for speed.
template <class T, class S>
FASTSSL_INLINE Vec<T> load_any(const S* p) {
  if constexpr (sizeof(T) == 8 && sizeof(S) != 8) {
    Vec<T> v;
    for (int l = 0; l < Simd<T>::kWidth; ++l) v[l] = widen_one(p[l]);
    return v;
  } else {
    return load<T>(p);
  }
}
// The first `count` lanes; the others are `rest`.
template <class T, class S>
FASTSSL_INLINE Vec<T> load_part(const S* p, int64_t count, T rest) {
  Vec<T> v = broadcast<T>(rest);
  for (int64_t l = 0; l < count; ++l) v[l] = widen_one(p[l]);
  return v;
}
// One element every `stride`.
template <class T, class S>
FASTSSL_INLINE Vec<T> load_strided(const S* p, int64_t stride, int64_t count) {
  Vec<T> v{};
  for (int64_t l = 0; l < count; ++l) v[l] = widen_one(p[l * stride]);
  return v;
}

// ---- T -> element types
// ----------------------------------------------------------------------------------------

template <class T>
FASTSSL_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
// Past the caches, see kStreamBytes. p must be a multiple of the vector's size.
template <class T>
FASTSSL_INLINE void stream(T* p, Vec<T> v) {
#if !defined(__x86_64__)
  store<T>(p, v);
#elif FASTSSL_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_as<__m512i>(v));
#elif FASTSSL_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(v));
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(v));
#endif
}
template <class T, int COUNT>
FASTSSL_INLINE void store_lanes(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, COUNT * sizeof(T));
}
FASTSSL_INLINE void narrow(uint16_t* p, Simd<float>::U v) {
  const Simd<float>::Half half = __builtin_convertvector(v, Simd<float>::Half);
  __builtin_memcpy(p, &half, sizeof(half));
}
// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
FASTSSL_INLINE void store(BFloat16Bits* p, Vec<float> v) {
  using U = Simd<float>::U;
  const U bits = bits_as<U>(v);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  narrow(&p->bits, (v == v) ? rounded : U{} + 0x7fc0u);
}
FASTSSL_INLINE void store(HalfBits* p, Vec<float> v) {
  using U = Simd<float>::U;
  const U bits = bits_as<U>(v);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  // Normal numbers: rebias the exponent, round the 13 bits that go. Carries run into the exponent, as they
  // should.
  const U normal = (magnitude + (U{} + 0xc8000fffu) + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormals: adding 0.5 aligns the mantissa, and the adder rounds.
  const U tiny = bits_as<U>(bits_as<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  U result = magnitude < (U{} + 0x38800000u) ? tiny : normal;
  result = magnitude >= (U{} + 0x47800000u) ? U{} + 0x7c00u : result;
  result = magnitude > (U{} + 0x7f800000u) ? U{} + 0x7e00u : result;
  narrow(&p->bits, result | sign);
}
template <class T, class S>
FASTSSL_INLINE void store_any(S* p, Vec<T> v) {
  if constexpr (sizeof(T) == 8 && sizeof(S) != 8) {  // a float64 computation with a narrower result: rare
    for (int l = 0; l < Simd<T>::kWidth; ++l) {
      S lanes[Simd<float>::kWidth];
      store(lanes, broadcast<float>(static_cast<float>(v[l])));
      p[l] = lanes[0];
    }
  } else {
    store(p, v);
  }
}
template <class T, class S>
FASTSSL_INLINE void store_part(S* p, Vec<T> v, int64_t count) {
  S lanes[Simd<T>::kWidth];
  store_any<T>(lanes, v);
  for (int64_t l = 0; l < count; ++l) p[l] = lanes[l];
}

// ---- exp2
// ------------------------------------------------------------------------------------------------------

// 2^t for t <= 0 or small: t = n + f with |f| <= 1/2, a degree-5 minimax polynomial for 2^f (relative error
// 1.7e-7), times 2^n. Zero below the smallest normal number; any NaN stays one, whatever its bits.
FASTSSL_INLINE Vec<float> exp2(Vec<float> t) {
  using V = Vec<float>;
  using I = Simd<float>::I;
  const float magic = 0x1.8p23f + 127;  // adding it leaves round(t) + 127 in the low bits of the mantissa
  const V shifted = t + magic;
  const V f = t - (shifted - magic);
  V p = V{} + 0.0013264722656458616f;
  p = p * f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  const V power = bits_as<V>(bits_as<I>(shifted) << 23);
  const I vanishes = bits_as<I>(t < V{} - 126.0f);
  return bits_as<V>(bits_as<I>(p * power) & ~vanishes);
}
FASTSSL_INLINE Vec<double> exp2(Vec<double> t) {
  for (int l = 0; l < Simd<double>::kWidth; ++l) t[l] = std::exp2(t[l]);
  return t;
}

// ---- log2
// ------------------------------------------------------------------------------------------------------

// log2 of normal numbers above 0: v = m 2^e with m in [√½, √2), a degree-8 polynomial for log(1 + f), f = m
// − 1. The error is below one unit in the last place of the larger of 1/8 and the result.
FASTSSL_INLINE Vec<float> log2(Vec<float> v) {
  using V = Vec<float>;
  using I = Simd<float>::I;
  const I bits = bits_as<I>(v) - 0x3f3504f3;  // √½ and above: exponent 0
  const I exponent = bits >> 23;
  const V f = bits_as<V>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  V p = V{} + 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const V square = f * f;
  const V log = f + (p * f - 0.5f) * square;
  return log * 1.44269504f + __builtin_convertvector(exponent, V);
}
FASTSSL_INLINE Vec<double> log2(Vec<double> v) {
  for (int l = 0; l < Simd<double>::kWidth; ++l) v[l] = std::log2(v[l]);
  return v;
}

// ---- transposition
// ---------------------------------------------------------------------------------------------

template <class T, int S, int... L>
FASTSSL_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  constexpr int W = Simd<T>::kWidth;
  const Vec<T> low = __builtin_shufflevector(a, b, ((L & S) == 0 ? L : W + L - S)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((L & S) == 0 ? L + S : W + L)...);
  a = low;
  b = high;
}
template <class T, int S>
FASTSSL_INLINE void exchange_blocks(Vec<T>* rows) {
  constexpr int W = Simd<T>::kWidth;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & S) == 0) exchange<T, S>(rows[i], rows[i + S], std::make_integer_sequence<int, W>());
  }
  if constexpr (2 * S < W) exchange_blocks<T, 2 * S>(rows);
}
// W vectors as the rows of a W×W matrix become its columns: blocks of side 1, 2, 4 … change places.
template <class T>
FASTSSL_INLINE void transpose(Vec<T>* rows) {
  exchange_blocks<T, 1>(rows);
}

}  // namespace fastssl::cpu::FASTSSL_ISA
