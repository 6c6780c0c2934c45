// sample_tokens on the CPU: where points lie, how maps are read, and the table of kernels that
// sample_tokens.cpp calls. Included once per instruction set by foreach_isa.h.

namespace fastssl::cpu::FASTSSL_ISA {

// Elements are summed in double where they are double, else in float.
template <class S>
using Sum = std::conditional_t<sizeof(S) == 8, double, float>;

// ---- points
// ------------------------------------------------------------------------------------------------------

// The cell of four token centres around a point: north-west (y, x), north-east, south-west, south-east.
template <class T>
struct Cell {
  int64_t y, x;  // -2 where no centre of the cell is in the map
  T fy, fx;      // position in the cell, 0 … 1; NaN where the coordinate is not finite
  T weight[4];
};

// One coordinate of a point: its cell, and its position in there. In double: in float, rounding alone would
// move a point of a map of 100 tokens by 4e-6 of a token, and some points into the next cell.
inline void locate_one(double coordinate, int64_t size, int64_t& cell, double& position) {
  const double at = ((coordinate + 1) * static_cast<double>(size) - 1) / 2;
  const double floor = std::floor(at);
  position = at - floor;
  cell = floor >= -1 && floor < static_cast<double>(size) ? static_cast<int64_t>(floor) : -2;
}

template <class T, class G>
void locate_points(const SampleTokens& op, const G* grid, Cell<T>* cells) {
  for (int64_t p = 0; p < op.points; ++p, grid += op.grid.point_stride) {
    Cell<T>& cell = cells[p];
    double fy, fx;
    locate_one(double{widen_one(grid[0])}, op.width, cell.x, fx);
    locate_one(double{widen_one(grid[op.grid.element_stride])}, op.height, cell.y, fy);
    cell.fy = static_cast<T>(fy);
    cell.fx = static_cast<T>(fx);
    cell.weight[0] = static_cast<T>((1 - fy) * (1 - fx));
    cell.weight[1] = static_cast<T>((1 - fy) * fx);
    cell.weight[2] = static_cast<T>(fy * (1 - fx));
    cell.weight[3] = static_cast<T>(fy * fx);
  }
}
// The cells of all points of one image.
template <class T>
void locate(const SampleTokens& op, int64_t image, Cell<T>* cells) {
  const int64_t offset = image * op.grid.batch_stride;
  switch (op.grid.dtype) {
    case Dtype::kFloat:
      return locate_points<T>(op, static_cast<const float*>(op.grid.data) + offset, cells);
    case Dtype::kDouble:
      return locate_points<T>(op, static_cast<const double*>(op.grid.data) + offset, cells);
    case Dtype::kBFloat16:
      return locate_points<T>(op, static_cast<const BFloat16Bits*>(op.grid.data) + offset, cells);
    case Dtype::kHalf:
      return locate_points<T>(op, static_cast<const HalfBits*>(op.grid.data) + offset, cells);
  }
}

// ---- maps
// --------------------------------------------------------------------------------------------------------

// A map whose channels are vectors: the tokens as they lie, or a packed copy of one vector of channels. A
// packed map costs one load and a share of a transposition per element, once; gathering lanes at each point
// would cost four loads of one element for each of the result. It stays in the first-level cache (196 tokens:
// 12 KB).
template <class E>
struct Map {
  const E* data;
  int64_t height, width, y_stride, x_stride, channel_stride;
};

// The four tokens of a cell; one that is outside the map is a token of zeros.
template <class E>
struct Tokens {
  const E* at[4];
  int64_t stride[4];

  template <class T>
  FASTSSL_INLINE Tokens(const Map<E>& map, const Cell<T>& cell, const E* zeros) {
    for (int k = 0; k < 4; ++k) {
      const int64_t y = cell.y + k / 2, x = cell.x + k % 2;
      const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
      at[k] = inside ? map.data + y * map.y_stride + x * map.x_stride : zeros;
      stride[k] = inside ? map.channel_stride : 0;
    }
  }

  // `count` channels of token k from `channel` on. UNIT: they lie side by side.
  template <class T, bool UNIT>
  FASTSSL_INLINE Vec<T> load(int k, int64_t channel, int64_t count) const {
    if (!UNIT) return load_strided<T>(at[k] + channel * stride[k], stride[k], count);
    if (count == Simd<T>::kWidth) return load_any<T>(at[k] + channel);
    return load_part<T>(at[k] + channel, count, T{0});
  }
};

// Channels of rows: up to kWidest side by side, in blocks of almost equal size.
constexpr int64_t kWidest = 256;
template <class T>
int64_t balanced_block(int64_t channels) {
  const int64_t blocks = std::max<int64_t>(1, ceil_div(channels, kWidest));
  return round_up(std::max<int64_t>(1, ceil_div(channels, blocks)), Simd<T>::kWidth);
}

inline bool is_unit(int64_t channel_stride, int64_t channels) { return channel_stride == 1 || channels == 1; }
// Few points of a large map: packing all of it would cost more than gathering lanes.
inline bool is_sparse(const SampleTokens& op) { return op.height * op.width > 32 * op.points; }
inline bool is_packed(const SampleTokens& op) {
  return !is_unit(op.x.channel_stride, op.channels) && !is_sparse(op);
}

// Tokens (or points) of up to kWidth channels side by side: packed[row][channel], zero beyond `count`.
template <class T, class S>
void pack_map(const S* map, const TokenMaps& m, int64_t height, int64_t width, int64_t count, T* packed) {
  constexpr int W = Simd<T>::kWidth;
  const bool flat = m.y_stride == width * m.x_stride;
  const int64_t rows = flat ? 1 : height, depth = flat ? height * width : width;
  for (int64_t y = 0; y < rows; ++y, map += m.y_stride, packed += depth * W)
    PackFrom<T, S>::template panel<W>(packed, map, m.channel_stride, m.x_stride, count, depth);
}
// The same the other way round.
template <class T, class S>
void unpack_map(const T* packed, const TokenMaps& m, int64_t height, int64_t width, int64_t count, S* map) {
  constexpr int W = Simd<T>::kWidth;
  const bool flat = m.y_stride == width * m.x_stride;
  const int64_t rows = flat ? 1 : height, depth = flat ? height * width : width;
  for (int64_t y = 0; y < rows; ++y, map += m.y_stride, packed += depth * W)
    store_strip_as<T>(packed, W, depth, count, map, m.x_stride, m.channel_stride);
}

// The address of one image's channels from `channel` on.
template <class S>
S* element_of(const TokenMaps& m, int64_t image, int64_t channel) {
  return static_cast<S*>(m.data) + image * m.batch_stride + channel * m.channel_stride;
}
template <class S>
Map<S> map_of(const SampleTokens& op, int64_t image, int64_t channel) {
  const TokenMaps& m = op.x;
  return {element_of<S>(m, image, channel), op.height, op.width, m.y_stride, m.x_stride, m.channel_stride};
}
template <class T>
Map<T> packed_map(const SampleTokens& op, const T* packed) {
  constexpr int W = Simd<T>::kWidth;
  return {packed, op.height, op.width, op.width * W, W, 1};
}

}  // namespace fastssl::cpu::FASTSSL_ISA

#include "cpu/sample_tokens_forward.h"
#include "cpu/sample_tokens_backward.h"

namespace fastssl::cpu::FASTSSL_ISA {

template <class S>
constexpr SampleKernels kSampleKernels{sample_forward_blocks<S>, sample_forward<S>, sample_backward_blocks<S>,
                                       sample_backward<S>};

inline SampleKernels sample_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return kSampleKernels<double>;
    case Dtype::kFloat:
      return kSampleKernels<float>;
    case Dtype::kBFloat16:
      return kSampleKernels<BFloat16Bits>;
    default:
      return kSampleKernels<HalfBits>;
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
