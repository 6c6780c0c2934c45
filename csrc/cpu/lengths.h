// Rows of length one: packing vectors divided by their lengths, and the gradient through that division.
// Included once per instruction set, before the kernels that use it.

namespace fastssl::cpu::FASTSSL_ISA {

// Divides every lane of packed panels by its length; a vector of length at most kNoLength becomes zero.
constexpr double kNoLength = 1e-12;

template <class T, int LANES>
void inverse_lengths(const T* panel, int64_t depth, T* inverse) {
  constexpr int STRIDE = kPanelStride<T, LANES>;
  double squares[LANES] = {};  // one long float chain of alike terms would round the same way every time
  for (int64_t k = 0; k < depth; ++k) {
    for (int l = 0; l < LANES; ++l) {
      const double element = panel[k * STRIDE + l];
      squares[l] += element * element;
    }
  }
  for (int l = 0; l < LANES; ++l)
    inverse[l] = squares[l] > kNoLength * kNoLength ? static_cast<T>(1 / std::sqrt(squares[l])) : T(0);
}
template <class T, int LANES>
void normalize_panels(T* panels, int64_t vectors, int64_t depth) {
  constexpr int STRIDE = kPanelStride<T, LANES>;
  for (int64_t first = 0; first < vectors; first += LANES, panels += depth * STRIDE) {
    T inverse[LANES];
    inverse_lengths<T, LANES>(panels, depth, inverse);
    for (int64_t k = 0; k < depth; ++k)
      for (int l = 0; l < LANES; ++l) panels[k * STRIDE + l] *= inverse[l];
  }
}
// Packs the rows of one head as lanes, divided by their lengths where asked.
template <class T, int LANES>
void pack_rows(T* out, const void* in, const Strided& m, int64_t rows, int64_t depth, bool normalize) {
  pack<T, LANES>(out, in, m.dtype, m.row_stride, m.column_stride, rows, depth);
  if (normalize) normalize_panels<T, LANES>(out, rows, depth);
}
// Packs them the other way round, their `depth` elements as lanes: the right factor of a product that runs
// over rows. `inverse` has room for round_up(rows, LANES) numbers and `vectors` for depth · LANES;
// neither is used without `normalize`.
template <class T, int LANES>
void pack_depth(T* out, const void* in, const Strided& m, int64_t rows, int64_t depth, bool normalize,
                T* inverse, T* vectors) {
  pack<T, LANES>(out, in, m.dtype, m.column_stride, m.row_stride, depth, rows);
  if (!normalize) return;
  for (int64_t j = 0; j < rows; j += LANES) {
    const int64_t some = std::min<int64_t>(LANES, rows - j);
    const char* first = static_cast<const char*>(in) + j * m.row_stride * element_size(m.dtype);
    pack<T, LANES>(vectors, first, m.dtype, m.row_stride, m.column_stride, some, depth);
    inverse_lengths<T, LANES>(vectors, depth, inverse + j);
  }
  for (int64_t p = 0; p < depth; p += LANES)
    for (int64_t j = 0; j < rows; ++j)
      for (int l = 0; l < LANES; ++l) out[p * rows + j * LANES + l] *= inverse[j];
}

// Through the division by the length: dx = (ĝ − x̂ (x̂ · ĝ)) / |x|, one row at a time.
template <class T, class S>
void through_length(const S* x, int64_t stride, int64_t depth, T inverse, T* grad) {
  double sum = 0;
  for (int64_t k = 0; k < depth; ++k) sum += double{grad[k]} * widen_one(x[k * stride]);
  const T dot = static_cast<T>(sum * inverse);
  for (int64_t k = 0; k < depth; ++k)
    grad[k] = inverse * (grad[k] - static_cast<T>(widen_one(x[k * stride])) * inverse * dot);
}
template <class T>
void through_lengths(const void* x, const Strided& m, int64_t rows, int64_t depth, const T* inverse, T* strip,
                     int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, strip += stride) {
    const int64_t offset = r * m.row_stride, step = m.column_stride;
    switch (m.dtype) {
      case Dtype::kFloat:
        through_length<T>(static_cast<const float*>(x) + offset, step, depth, inverse[r], strip);
        break;
      case Dtype::kDouble:
        if constexpr (sizeof(T) == 8)
          through_length<T>(static_cast<const double*>(x) + offset, step, depth, inverse[r], strip);
        break;
      case Dtype::kBFloat16:
        through_length<T>(static_cast<const BFloat16Bits*>(x) + offset, step, depth, inverse[r], strip);
        break;
      case Dtype::kHalf:
        through_length<T>(static_cast<const HalfBits*>(x) + offset, step, depth, inverse[r], strip);
        break;
    }
  }
}
// The same for a strip of at most kTileRows rows of gradients; `vectors` has room for a strip.
template <class T>
void gradient_through_lengths(const void* x, const Strided& m, int64_t rows, int64_t depth, T* vectors,
                              T* strip, int64_t stride) {
  T inverse[kTileRows];
  pack<T, kTileRows>(vectors, x, m.dtype, m.row_stride, m.column_stride, rows, depth);
  inverse_lengths<T, kTileRows>(vectors, depth, inverse);
  through_lengths<T>(x, m, rows, depth, inverse, strip, stride);
}

}  // namespace fastssl::cpu::FASTSSL_ISA
