// Blocks of tokens as rows of T: in place where the tensor has such rows, else through a copy that stays in
// the first-level cache. Included once per instruction set, before the kernels that use it.

namespace fastssl::cpu::FASTSSL_ISA {

constexpr int64_t kBlockTokens = 16;

// Calls f(c, vectors, lanes) for channels [from, to): four whole vectors at a time, then one, then a part of
// one.
template <class T, class F>
FASTSSL_INLINE void for_channels(int64_t from, int64_t to, F&& f) {
  constexpr int64_t W = Simd<T>::kWidth;
  int64_t c = from;
  for (; c + 4 * W <= to; c += 4 * W) f(c, std::integral_constant<int, 4>(), W);
  for (; c + W <= to; c += W) f(c, std::integral_constant<int, 1>(), W);
  if (c < to) f(c, std::integral_constant<int, 1>(), to - c);
}
template <class T>
FASTSSL_INLINE Vec<T> load_some(const T* p, int64_t lanes, T rest = T{0}) {
  return lanes == Simd<T>::kWidth ? load<T>(p) : load_part<T>(p, lanes, rest);
}
template <class T>
FASTSSL_INLINE void store_some(T* p, Vec<T> v, int64_t lanes) {
  lanes == Simd<T>::kWidth ? store<T>(p, v) : store_part<T>(p, v, lanes);
}
template <class T>
FASTSSL_INLINE Vec<T> keep_some(Vec<T> v, int64_t lanes) {
  return lanes == Simd<T>::kWidth ? v : keep_lanes<T>(v, lanes, T{0});
}

template <class T, class S>
void copy_rows(const S* from, int64_t token_stride, int64_t channel_stride, int64_t tokens, int64_t channels,
               T* to, int64_t stride) {
  constexpr int64_t W = Simd<T>::kWidth;
  const int64_t whole = channels / W * W;
  if (token_stride == 1 && channel_stride != 1) {
    for (int64_t c = 0; c < channels; c += W) {
      for (int64_t n = 0; n < tokens; n += W) {
        const int64_t wide = std::min(W, channels - c), lanes = std::min(W, tokens - n);
        Vec<T> block[W];
        for (int64_t i = 0; i < W; ++i) {
          const S* p = from + (c + i) * channel_stride + n;
          block[i] = i >= wide ? Vec<T>{} : lanes == W ? load_any<T>(p) : load_part<T>(p, lanes, T{0});
        }
        transpose<T>(block);
        for (int64_t i = 0; i < lanes; ++i) store<T>(to + (n + i) * stride + c, block[i]);
      }
    }
    return;
  }
  for (int64_t n = 0; n < tokens; ++n, from += token_stride, to += stride) {
    for (int64_t c = 0; c < channels; c += W) {
      const S* p = from + c * channel_stride;
      const int64_t lanes = std::min(W, channels - c);
      store<T>(to + c, channel_stride != 1 ? load_strided<T>(p, channel_stride, lanes)
                       : c < whole         ? load_any<T>(p)
                                           : load_part<T>(p, lanes, T{0}));
    }
  }
}

// Tokens of a tensor (B, N, C) as rows.
template <class T>
struct TokenRows {
  const Strided& x;
  int64_t channels;
  T* copy = nullptr;  // room for a block; rows are whole vectors

  // Rows of `stride` elements for tokens [first, first + count) of an image; count is at most kBlockTokens.
  const T* at(int64_t image, int64_t first, int64_t count, int64_t& stride) const {
    const void* from = element(x, image, 0, first);
    if (in_place()) {
      stride = x.row_stride;
      return static_cast<const T*>(from);
    }
    stride = copy_stride();
    const int64_t rs = x.row_stride, cs = x.column_stride;
    switch (x.dtype) {
      case Dtype::kFloat:
        copy_rows<T>(static_cast<const float*>(from), rs, cs, count, channels, copy, stride);
        break;
      case Dtype::kDouble:
        if constexpr (sizeof(T) == 8)
          copy_rows<T>(static_cast<const double*>(from), rs, cs, count, channels, copy, stride);
        break;
      case Dtype::kBFloat16:
        copy_rows<T>(static_cast<const BFloat16Bits*>(from), rs, cs, count, channels, copy, stride);
        break;
      case Dtype::kHalf:
        copy_rows<T>(static_cast<const HalfBits*>(from), rs, cs, count, channels, copy, stride);
        break;
    }
    return copy;
  }
  bool in_place() const {
    return x.dtype == (sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat) &&
           (x.column_stride == 1 || channels == 1);
  }
  int64_t copy_stride() const { return round_up(channels, Simd<T>::kWidth); }
  int64_t copy_size() const { return in_place() ? 0 : kBlockTokens * copy_stride(); }
};

}  // namespace fastssl::cpu::FASTSSL_ISA
