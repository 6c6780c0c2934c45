// Matrix products of one (image, head) on packed panels: packing from any strides and element type, and the
// register tile. Included once per instruction set by foreach_isa.h.
//
// A panel holds `lanes` neighbouring vectors side by side: panel[depth][lane], zero where there is no vector.
// Its rows are whole vectors of the processor, so that stores do not straddle lines of the cache. Every
// element of a product sums the same terms in the same order, whichever tile it falls in. So (X Xᵀ)_ij and (X
// Xᵀ)_ji are the same bits, and how the work is split over threads changes nothing.

namespace fastssl::cpu::FASTSSL_ISA {

constexpr int kTileRows = FASTSSL_TILE_ROWS;
constexpr int kTileVectors = 2;
template <class T>
constexpr int kTileColumns = kTileVectors * Simd<T>::kWidth;
template <class T, int LANES>
constexpr int kPanelStride = (LANES + Simd<T>::kWidth - 1) / Simd<T>::kWidth * Simd<T>::kWidth;
template <class T>
constexpr int kStripStride = kPanelStride<T, kTileRows>;

// Elements of `vectors` vectors packed as panels of kTileRows, and where the panel from vector i on begins.
template <class T>
constexpr int64_t strips_size(int64_t vectors, int64_t depth) {
  return ceil_div(vectors, kTileRows) * kStripStride<T> * depth;
}
template <class T, class P>
FASTSSL_INLINE P* strip_at(P* panels, int64_t i, int64_t depth) {
  return panels + i / kTileRows * kStripStride<T> * depth;
}

template <class T, class S>
struct PackFrom {
  // Packs vectors [first, first + count) of `depth` elements into one panel of LANES lanes.
  template <int LANES>
  static void panel(T* out, const S* in, int64_t lane_stride, int64_t depth_stride, int64_t count,
                    int64_t depth) {
    constexpr int W = Simd<T>::kWidth, STRIDE = kPanelStride<T, LANES>;
    if (lane_stride == 1) {
      // Lanes past LANES may be read where the next row lies behind them.
      const int64_t all = depth_stride >= STRIDE - LANES ? depth - (STRIDE > LANES) : 0;
      const int64_t whole = count < LANES ? 0 : std::max<int64_t>(all, 0);
      for (int64_t k = 0; k < whole; ++k) {
#pragma GCC unroll 4
        for (int lane = 0; lane < STRIDE; lane += W)
          store<T>(out + k * STRIDE + lane, load_any<T>(in + k * depth_stride + lane));
      }
      for (int64_t k = whole; k < depth; ++k) {
        for (int lane = 0; lane < LANES; ++lane)
          out[k * STRIDE + lane] =
              lane < count ? static_cast<T>(widen_one(in[k * depth_stride + lane])) : T{0};
      }
      return;
    }
    const int64_t blocks = depth_stride == 1 ? depth / W : 0;
    for (int lane = 0; lane < LANES; lane += W) {
      const int64_t here = std::clamp<int64_t>(count - lane, 0, std::min(W, LANES - lane));
      for (int64_t block = 0; block < blocks; ++block) {
        Vec<T> rows[W];
        for (int r = 0; r < W; ++r) {
          rows[r] = r < here ? load_any<T>(in + (lane + r) * lane_stride + block * W) : Vec<T>{};
        }
        transpose<T>(rows);
        for (int r = 0; r < W; ++r) store<T>(out + (block * W + r) * STRIDE + lane, rows[r]);
      }
      for (int64_t k = blocks * W; k < depth; ++k) {
        store<T>(out + k * STRIDE + lane,
                 load_strided<T>(in + lane * lane_stride + k * depth_stride, lane_stride, here));
      }
    }
  }
};

// Packs `vectors` vectors of `depth` elements into panels of LANES lanes.
template <class T, int LANES>
void pack(T* out, const void* in, Dtype dtype, int64_t lane_stride, int64_t depth_stride, int64_t vectors,
          int64_t depth) {
  for (int64_t first = 0; first < vectors; first += LANES, out += depth * kPanelStride<T, LANES>) {
    const int64_t count = std::min<int64_t>(LANES, vectors - first), at = first * lane_stride;
    switch (dtype) {
      case Dtype::kFloat:
        PackFrom<T, float>::template panel<LANES>(out, static_cast<const float*>(in) + at, lane_stride,
                                                  depth_stride, count, depth);
        break;
      case Dtype::kDouble:
        if constexpr (sizeof(T) == 8) {
          PackFrom<T, double>::template panel<LANES>(out, static_cast<const double*>(in) + at, lane_stride,
                                                     depth_stride, count, depth);
        }
        break;
      case Dtype::kBFloat16:
        PackFrom<T, BFloat16Bits>::template panel<LANES>(out, static_cast<const BFloat16Bits*>(in) + at,
                                                         lane_stride, depth_stride, count, depth);
        break;
      case Dtype::kHalf:
        PackFrom<T, HalfBits>::template panel<LANES>(out, static_cast<const HalfBits*>(in) + at, lane_stride,
                                                     depth_stride, count, depth);
        break;
    }
  }
}

// The panel of vectors i … i + kTileRows, taken from panels of kTileColumns lanes that hold them, which is
// faster than packing them once more. `panels` may be read one vector past their end.
template <class T>
void strip_of_panels(const T* panels, int64_t vectors, int64_t depth, int64_t i, T* out) {
  constexpr int W = Simd<T>::kWidth, C = kTileColumns<T>, STRIDE = kStripStride<T>;
  for (int lane = 0; lane < STRIDE; lane += W) {
    const int64_t first = i + lane, at = first % C, here = C - at;
    const T* from = panels + (first - at) * depth + at;
    if (first >= round_up(vectors, C)) {
      for (int64_t k = 0; k < depth; ++k) store<T>(out + k * STRIDE + lane, Vec<T>{});
    } else if (here >= W || first + here >= round_up(vectors, C)) {
      for (int64_t k = 0; k < depth; ++k) store<T>(out + k * STRIDE + lane, load<T>(from + k * C));
    } else {  // the rest is in the next panel
      const T* next = panels + (first + here) * depth - here;
      for (int64_t k = 0; k < depth; ++k)
        store<T>(out + k * STRIDE + lane, join_lanes<T>(load<T>(from + k * C), load<T>(next + k * C), here));
    }
  }
}

// Columns [i, i + R) of a matrix of `rows` rows as a panel; whole vectors are read.
template <class T>
FASTSSL_INLINE void panel_of_columns(const T* matrix, int64_t stride, int64_t rows, int64_t i, T* panel) {
  constexpr int W = Simd<T>::kWidth, STRIDE = kStripStride<T>;
  for (int64_t k = 0; k < rows; ++k) {
#pragma GCC unroll 4
    for (int l = 0; l < STRIDE; l += W)
      store<T>(panel + k * STRIDE + l, load<T>(matrix + k * stride + i + l));
  }
}

// c[i][j] = Σ_k a[i · ROW + k · DEPTH] b[k][j] for ROWS rows and NV vectors of columns; added to c with ADD.
// `b_stride` is the distance of b's rows. Sums run over kChunk products at a time: one long chain of
// alike terms would round the same way every time, and its error would grow with the depth.
constexpr int64_t kChunk = 64;

template <class T, int ROWS, int NV, int64_t ROW, int64_t DEPTH, bool ADD>
FASTSSL_INLINE void strided_tile(int64_t depth, const T* a, const T* b, int64_t b_stride, T* c,
                                 int64_t c_stride) {
  constexpr int W = Simd<T>::kWidth;
  int64_t k = 0;
  do {
    const bool fresh = !ADD && k == 0;
    Vec<T> sum[ROWS][NV] = {};
    for (const int64_t end = std::min(depth, k + kChunk); k < end; ++k) {
      Vec<T> column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load<T>(b + k * b_stride + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Vec<T> row = broadcast<T>(a[k * DEPTH + i * ROW]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] += row * column[v];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* to = c + i * c_stride + v * W;
        store<T>(to, fresh ? sum[i][v] : load<T>(to) + sum[i][v]);
      }
    }
  } while (k < depth);
}
// The same of a whole packed strip.
template <class T, int NV, bool ADD = false>
FASTSSL_INLINE void tile(int64_t depth, const T* a, const T* b, int64_t b_lanes, T* c, int64_t c_stride) {
  strided_tile<T, kTileRows, NV, 1, kStripStride<T>, ADD>(depth, a, b, b_lanes, c, c_stride);
}

// A tile of kTileRows rows or, where a matrix ends, of little more than the `rows` that are left of it.
template <class T, int64_t ROW, int64_t DEPTH, bool ADD>
__attribute__((noinline)) void last_tile(int64_t rows, int64_t vectors, int64_t depth, const T* a, const T* b,
                                         int64_t b_stride, T* c, int64_t c_stride) {
  constexpr int R = kTileRows, HALF = (R + 1) / 2, QUARTER = (R + 3) / 4;
  const auto run = [&](auto count, auto wide) {
    strided_tile<T, count, wide, ROW, DEPTH, ADD>(depth, a, b, b_stride, c, c_stride);
  };
  const auto run_wide = [&](auto count) {
    vectors > 1 ? run(count, std::integral_constant<int, 2>()) : run(count, std::integral_constant<int, 1>());
  };
  rows > HALF      ? run_wide(std::integral_constant<int, R>())
  : rows > QUARTER ? run_wide(std::integral_constant<int, HALF>())
                   : run_wide(std::integral_constant<int, QUARTER>());
}

// One strip of a product: kTileRows rows against columns [from, to) of the packed panels `b`; `from` is a
// multiple of the vector width. c is the strip's first row at column 0; columns are written in whole vectors.
// ADD: added to what is there.
template <class T, bool ADD = false>
void strip_product(int64_t depth, const T* a_panel, const T* b, int64_t from, int64_t to, T* c,
                   int64_t c_stride) {
  constexpr int W = Simd<T>::kWidth, N = kTileColumns<T>;
  for (int64_t j = from; j < to;) {
    const int64_t lane = j % N;
    const T* panel = b + (j - lane) * depth + lane;
    if (lane == 0 && to - j > W) {
      tile<T, 2, ADD>(depth, a_panel, panel, N, c + j, c_stride);
      j += N;
    } else {
      tile<T, 1, ADD>(depth, a_panel, panel, N, c + j, c_stride);
      j += W;
    }
  }
}

// Writes `rows` rows of a strip to a matrix of any strides, element by element type.
template <class T, class S>
void store_strip_as(const T* strip, int64_t stride, int64_t rows, int64_t columns, S* out, int64_t row_stride,
                    int64_t column_stride) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t whole = columns / W * W;
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = strip + r * stride;
      S* to = out + r * row_stride;
      for (int64_t j = 0; j < whole; j += W) store_any<T>(to + j, load<T>(from + j));
      if (whole < columns) store_part<T>(to + whole, load<T>(from + whole), columns - whole);
    }
  } else if (row_stride == 1) {
    for (int64_t j = 0; j < columns; j += W) {
      for (int64_t g = 0; g < rows; g += W) {
        const int64_t lanes = std::min<int64_t>(W, rows - g), wide = std::min<int64_t>(W, columns - j);
        Vec<T> block[W];
        for (int r = 0; r < W; ++r) block[r] = r < lanes ? load<T>(strip + (g + r) * stride + j) : Vec<T>{};
        transpose<T>(block);
        for (int64_t c = 0; c < wide; ++c) store_part<T>(out + (j + c) * column_stride + g, block[c], lanes);
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < columns; ++j)
        store_part<T>(out + r * row_stride + j * column_stride, broadcast<T>(strip[r * stride + j]), 1);
  }
}

template <class T>
void store_strip(const T* strip, int64_t stride, int64_t rows, int64_t columns, const Strided& out,
                 int64_t batch, int64_t head, int64_t row) {
  const int64_t offset = batch * out.batch_stride + head * out.head_stride + row * out.row_stride;
  const int64_t rs = out.row_stride, cs = out.column_stride;
  switch (out.dtype) {
    case Dtype::kFloat:
      return store_strip_as<T>(strip, stride, rows, columns, static_cast<float*>(out.data) + offset, rs, cs);
    case Dtype::kDouble:
      if constexpr (sizeof(T) == 8)
        store_strip_as<T>(strip, stride, rows, columns, static_cast<double*>(out.data) + offset, rs, cs);
      return;
    case Dtype::kBFloat16:
      return store_strip_as<T>(strip, stride, rows, columns, static_cast<BFloat16Bits*>(out.data) + offset,
                               rs, cs);
    case Dtype::kHalf:
      return store_strip_as<T>(strip, stride, rows, columns, static_cast<HalfBits*>(out.data) + offset, rs,
                               cs);
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
