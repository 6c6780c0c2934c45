// gram_loss on the CPU: tiles of the two Gram matrices, their sums, and the table of kernels that
// gram_loss.cpp calls. Included once per instruction set by foreach_isa.h.
//
// S = X Xᵀ and T = Y Yᵀ of one image are symmetric: only tiles on and below the diagonal are computed, and
// what is below it counts twice,
//   Σ_ij (S_ij − T_ij)² = Σ_i ((S_ii − T_ii)² + 2 Σ_{j<i} (S_ij − T_ij)²).
// A tile is summed in T, tiles in double.

#include "cpu/lengths.h"
#include "cpu/gradient_strips.h"

namespace fastssl::cpu::FASTSSL_ISA {

// Packed tokens of one image, and one tile of each matrix.
template <class T>
struct GramTiles {
  static constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const GramLoss& op;
  int64_t rows;                                            // of the strips that are packed at a time
  T *student = nullptr, *teacher = nullptr;                // all tokens as columns
  T *student_strips = nullptr, *teacher_strips = nullptr;  // some of them as rows
  T *s = nullptr, *t = nullptr;                            // tiles

  GramTiles(const GramLoss& op, int64_t rows) : op(op), rows(rows) {}

  template <class Take>
  void lay_out(Take&& take) {
    take(student, round_up(op.rows, C) * op.student_depth + W);
    take(teacher, round_up(op.rows, C) * op.teacher_depth + W);
    take(student_strips, strips_size<T>(rows, op.student_depth));
    take(teacher_strips, strips_size<T>(rows, op.teacher_depth));
    take(s, R * C);
    take(t, R * C);
  }
  void pack_columns(int64_t image) const {
    pack_rows<T, C>(student, element(op.student, image, 0), op.student, op.rows, op.student_depth,
                    op.normalize);
    pack_rows<T, C>(teacher, element(op.teacher, image, 0), op.teacher, op.rows, op.teacher_depth,
                    op.normalize);
  }
  // Rows [begin, end), `begin` on a strip.
  void pack_strips(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += R) {
      strip_of_panels<T>(student, op.rows, op.student_depth, i,
                         strip_at<T>(student_strips, i - begin, op.student_depth));
      strip_of_panels<T>(teacher, op.rows, op.teacher_depth, i,
                         strip_at<T>(teacher_strips, i - begin, op.teacher_depth));
    }
  }
  // s and t of the strip that begins `row` rows behind the first packed one, in the panel of columns from j
  // on; returns how many columns were computed. Columns where there is no token are zero, rows may be
  // anything.
  FASTSSL_INLINE int multiply(int64_t row, int64_t j) const {
    const bool narrow = op.rows - j <= W;
    const auto product = [&](const T* strips, const T* columns, int64_t depth, T* to) {
      const T *a = strip_at<T>(strips, row, depth), *b = columns + j * depth;
      narrow ? tile<T, 1>(depth, a, b, C, to, C) : tile<T, 2>(depth, a, b, C, to, C);
    };
    product(student_strips, student, op.student_depth, s);
    product(teacher_strips, teacher, op.teacher_depth, t);
    return narrow ? W : C;
  }
};

// S − T of one vector of similarities, negative ones removed from either.
template <class T, int REMOVE>
FASTSSL_INLINE Vec<T> difference(Vec<T> s, Vec<T> t) {
  if (REMOVE >= kRemoveTeacher) t = t < Vec<T>{} ? Vec<T>{} : t;
  if (REMOVE >= kRemoveBoth) s = s < Vec<T>{} ? Vec<T>{} : s;
  return s - t;
}
// Half the gradient of its square: 0 where the student's similarity was removed.
template <class T, int REMOVE>
FASTSSL_INLINE Vec<T> half_gradient(Vec<T> s, Vec<T> difference) {
  return REMOVE >= kRemoveBoth ? (s < Vec<T>{} ? Vec<T>{} : difference) : difference;
}

// Both matrices of one image as tiles: rows [begin, end) against all columns up to theirs. Returns their
// share of Σ (S − T)². Where `square` is given, half_gradient · scale is left in it, on both sides of the
// diagonal.
template <class T, int REMOVE>
double sum_of_tiles(const GramTiles<T>& tiles, int64_t begin, int64_t end, T scale, T* square,
                    int64_t stride) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const int64_t n = std::min(end, tiles.op.rows);
  double total = 0;
  for (int64_t j = 0; j < n; j += C) {
    for (int64_t i = std::max(begin, j / R * R); i < n; i += R) {
      const int columns = tiles.multiply(i - begin, j);
      const int count = static_cast<int>(std::min<int64_t>(R, tiles.op.rows - i));
      const bool below = j + columns <= i;
      Vec<T> once{}, twice{};
      for (int r = 0; r < count; ++r) {
        for (int v = 0; v < columns; v += W) {
          T* at = tiles.s + r * C + v;
          const Vec<T> s = load<T>(at), d = difference<T, REMOVE>(s, load<T>(tiles.t + r * C + v));
          const Vec<T> squared = d * d;
          if (below) {
            twice += squared;
          } else {
            const int64_t left = i + r - j - v;  // columns before the diagonal
            twice += keep_lanes<T>(squared, left, T{0});
            once += keep_lanes<T>(squared, left + 1, T{0}) - keep_lanes<T>(squared, left, T{0});
          }
          if (square != nullptr) {
            const Vec<T> g = half_gradient<T, REMOVE>(s, d) * scale;
            store<T>(at, g);
            store<T>(square + (i + r) * stride + j + v, g);
          }
        }
      }
      total += double{sum_lanes<T>(once)} + 2 * double{sum_lanes<T>(twice)};
      if (square == nullptr) continue;
      T mirrored[C * kStripStride<T>];
      pack<T, R>(mirrored, tiles.s, sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat, C, 1, count, columns);
      for (int c = 0; c < columns; ++c)
        std::memcpy(square + (j + c) * stride + i, mirrored + c * kStripStride<T>, R * sizeof(T));
    }
  }
  return total;
}

// Groups [begin, end) of kGramGroup strips of all images, one sum each.
template <class T, int REMOVE>
void gram_groups(const GramLoss& op, int64_t begin, int64_t end) {
  constexpr int64_t kRows = kGramGroup * kTileRows;
  const int64_t groups = ceil_div(op.rows, kRows);
  GramTiles<T> tiles(op, kRows);
  size_t bytes = 0;
  tiles.lay_out([&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  tiles.lay_out([&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / groups, turn = item % groups;
    // A group has more to do the further down it is: short and long ones in turns, for threads of equal load.
    const int64_t group = turn % 2 == 0 ? turn / 2 : groups - 1 - turn / 2;
    if (image != packed) tiles.pack_columns(image);
    packed = image;
    const int64_t first = group * kRows, last = std::min(op.rows, first + kRows);
    tiles.pack_strips(first, last);
    op.sums[image * groups + group] = sum_of_tiles<T, REMOVE>(tiles, first, last, T{0}, nullptr, 0);
  }
}

// Images [begin, end), one sum each; and their gradients where wanted, whose matrix stays in a core's cache.
template <class T, int REMOVE>
void gram_images(const GramLoss& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const int64_t n = op.rows;
  // Rows of the square are an odd number of vectors apart, or columns would share few places of the cache.
  const int64_t stride = (round_up(n, C) + R + W - 1) / W | 1;
  GramTiles<T> tiles(op, n);
  GradientStrips<T> gradient(n, op.student_depth, op.normalize);
  T *square = nullptr, *panel = nullptr;
  const auto lay_out = [&](auto&& take) {
    tiles.lay_out(take);
    if (!op.wants_gradient) return;
    gradient.lay_out(take);
    take(square, (round_up(n, C) + R) * stride * W);
    take(panel, n * kStripStride<T>);
  };
  size_t bytes = 0;
  lay_out([&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  lay_out([&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  const T scale = static_cast<T>(4 * op.weight);
  for (int64_t image = begin; image < end; ++image) {
    tiles.pack_columns(image);
    tiles.pack_strips(0, n);
    op.sums[image] = sum_of_tiles<T, REMOVE>(tiles, 0, n, scale, square, stride * W);
    if (!op.wants_gradient) continue;
    gradient.pack_factor(op.student, image, 0);
    for (int64_t i = 0; i < n; i += R) {
      panel_of_columns<T>(square, stride * W, n, i, panel);
      gradient.write(panel, op.student, op.grad_student, image, 0, i, std::min<int64_t>(R, n - i));
    }
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA

#include "cpu/gram_loss_gradient.h"

namespace fastssl::cpu::FASTSSL_ISA {

template <class T, int REMOVE>
constexpr GramLossKernels kGramKernels{gram_images<T, REMOVE>,         gram_groups<T, REMOVE>,
                                       kGramGroup * kTileRows,         GramBand<T>::bytes,
                                       gram_gradient_bands<T, REMOVE>, gram_gradient_pairs<T, REMOVE>,
                                       gram_gradient_store<T>};

template <class T>
const GramLossKernels& gram_kernels_of(int64_t remove) {
  return remove == kRemoveNone      ? kGramKernels<T, kRemoveNone>
         : remove == kRemoveTeacher ? kGramKernels<T, kRemoveTeacher>
                                    : kGramKernels<T, kRemoveBoth>;
}
inline const GramLossKernels& gram_kernels(bool in_double, int64_t remove) {
  return in_double ? gram_kernels_of<double>(remove) : gram_kernels_of<float>(remove);
}

}  // namespace fastssl::cpu::FASTSSL_ISA
