// What all CPU kernels share and no instruction set changes: element types, strided matrices, scratch memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastssl::cpu {

enum class Dtype : int { kFloat, kDouble, kBFloat16, kHalf };

// Bit patterns of the half types, so that they cannot be mistaken for integers.
struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

// A batch of matrices in anybody's memory: strides in elements.
struct Strided {
  void* data;
  Dtype dtype;
  int64_t batch_stride, head_stride, row_stride, column_stride;
};

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// The address of an element of row `row` of one (batch, head).
inline void* element(const Strided& m, int64_t batch, int64_t head, int64_t row = 0) {
  const int64_t offset = batch * m.batch_stride + head * m.head_stride + row * m.row_stride;
  return static_cast<char*>(m.data) + offset * element_size(m.dtype);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Results at least this large are written past the caches: they would not stay there, and a line that is
// written as a whole need not be read from memory first. stream_end() comes after a thread's last such store.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
inline void stream_zeros(char* to, int64_t bytes) {
#if defined(__x86_64__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    for (int64_t b = 0; b < bytes; b += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + b), _mm_setzero_si128());
    return;
  }
#endif
  std::memset(to, 0, bytes);
}

// Scratch memory of one thread, kept between calls: fresh pages cost more than most kernels here. What is
// larger than kKeep bytes is given back at the end of the call.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64, kKeep = size_t{4} << 20;

  explicit Scratch(size_t bytes) {
    thread_local Kept kept;
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > kKeep) {
      own_ = allocate(bytes);
      next_ = own_;
    } else {
      if (kept.size < bytes) {
        std::free(kept.data);
        kept.data = nullptr;
        kept.size = 0;
        kept.data = allocate(bytes);
        kept.size = bytes;
      }
      next_ = kept.data;
    }
  }
  ~Scratch() { std::free(own_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements, aligned for the widest vectors.
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return result;
  }
  template <class T>
  static size_t bytes_of(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  struct Kept {
    char* data = nullptr;
    size_t size = 0;
    ~Kept() { std::free(data); }
  };
  static char* allocate(size_t bytes) {
    void* p = std::aligned_alloc(kAlignment, std::max(bytes, kAlignment));
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<char*>(p);
  }
  char* own_ = nullptr;
  char* next_ = nullptr;
};

}  // namespace fastssl::cpu
