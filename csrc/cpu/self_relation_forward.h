// self_relation's forward on the CPU. Included by self_relation.h, once per instruction set.
//
// S = X Yᵀ in strips of kTileRows rows, A = softmax(scale · S) by rows while the strip is in cache, as powers
// of two: A_ij = E_ij / Σ_j E_ij, E_ij = 2^(f·S_ij − c_i), f = scale · log2(e). Without columns S is
// symmetric, and one shift c for the whole head keeps E symmetric: only tiles on and above the diagonal are
// computed, their transposes are copied. The shift is the largest f·S_ii, which no f·S_ij exceeds; every row
// holds its own 2^(f·S_ii − c), so that it is safe where the diagonal's spread is small. Elsewhere c_i is the
// row's maximum.

namespace fastssl::cpu::FASTSSL_ISA {

// The shift of a head whose packed rows are `panels`, or NaN where rows must have their own. With a spread of
// at most 16 the rounding of f·S − c stays below that of S itself.
template <class T, int LANES>
T shared_shift(const T* panels, int64_t vectors, int64_t depth, T factor) {
  T lowest = std::numeric_limits<T>::infinity(), highest = -lowest;
  for (int64_t first = 0; first < vectors; first += LANES, panels += depth * LANES) {
    T squares[LANES] = {};
    for (int64_t k = 0; k < depth; ++k)
      for (int l = 0; l < LANES; ++l) squares[l] += panels[k * LANES + l] * panels[k * LANES + l];
    for (int64_t l = 0; l < std::min<int64_t>(LANES, vectors - first); ++l) {
      lowest = std::min(lowest, squares[l]);
      highest = std::max(highest, squares[l]);
    }
  }
  // Both conditions are false for NaN. Large logits, whose rounding alone could empty a row, have their own
  // maxima.
  const bool safe = factor > 0 && factor * highest <= T(4096) && factor * (highest - lowest) <= T(16);
  return safe ? factor * highest : std::numeric_limits<T>::quiet_NaN();
}

// powers[j] = 2^(factor·s_j − shift) for j in [from, n), `from` a multiple of the vector width; a NaN shift
// means the row's own maximum. Both are read and written in whole vectors: what stands past n is nobody's.
// powers may be s.
template <class T>
FASTSSL_INLINE void powers_of_row(const T* s, T* powers, int64_t from, int64_t n, T factor, T shift) {
  constexpr int W = Simd<T>::kWidth;
  if (shift == shift) {
    for (int64_t j = from; j < n; j += W) store<T>(powers + j, exp2(load<T>(s + j) * factor - shift));
    return;
  }
  // The difference first: at the maximum it is exactly zero, however large the logits are.
  const int64_t whole = (n - 1) / W * W;
  const T sign = factor < 0 ? T(-1) : T(1), size = std::abs(factor);
  Vec<T> best = keep_lanes<T>(load<T>(s + whole) * sign, n - whole, -std::numeric_limits<T>::infinity());
  for (int64_t j = from; j < whole; j += W) best = max<T>(best, load<T>(s + j) * sign);
  const T largest = max_lanes<T>(best);
  for (int64_t j = from; j < n; j += W) store<T>(powers + j, exp2((load<T>(s + j) * sign - largest) * size));
}

// out = powers / Σ powers for one row of n.
template <class T, class S>
FASTSSL_INLINE void divide_row(const T* powers, S* out, int64_t n) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t whole = (n - 1) / W * W, rest = n - whole;
  Vec<T> total = keep_lanes<T>(load<T>(powers + whole), rest, T{0}), more{};
  int64_t j = 0;
  for (; j + W < whole; j += 2 * W) {  // two sums, so that additions need not wait for each other
    total += load<T>(powers + j);
    more += load<T>(powers + j + W);
  }
  if (j < whole) total += load<T>(powers + j);
  const T inverse = T(1) / sum_lanes<T>(total + more);
  for (j = 0; j < whole; j += W) store_any<T>(out + j, load<T>(powers + j) * inverse);
  if (whole > 0) {  // the last W elements, some of them once more
    store_any<T>(out + n - W, load<T>(powers + n - W) * inverse);
  } else {
    store_part<T>(out, load<T>(powers) * inverse, rest);
  }
}

template <class T>
void divide_rows(const SelfRelation& op, const T* powers, int64_t stride, int64_t out_row, int64_t count) {
  for (int64_t i = 0; i < count; ++i, powers += stride) {
    const int64_t n = op.columns, offset = (out_row + i) * n;
    switch (op.relation_dtype) {
      case Dtype::kFloat:
        divide_row<T>(powers, static_cast<float*>(op.relation) + offset, n);
        break;
      case Dtype::kDouble:
        if constexpr (sizeof(T) == 8) divide_row<T>(powers, static_cast<double*>(op.relation) + offset, n);
        break;
      case Dtype::kBFloat16:
        divide_row<T>(powers, static_cast<BFloat16Bits*>(op.relation) + offset, n);
        break;
      case Dtype::kHalf:
        divide_row<T>(powers, static_cast<HalfBits*>(op.relation) + offset, n);
        break;
    }
  }
}

// Columns from `first` on of a strip of kTileRows rows become rows of `square`, from column `column` on.
// EXACT writes kTileRows elements a row; else whole vectors, whose surplus the strips below overwrite.
template <class T, bool EXACT>
void mirror(const T* strip, int64_t strip_stride, int64_t first, int64_t n, T* square, int64_t stride,
            int64_t column) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, kRest = R % W == 0 ? W : R % W;
  for (int64_t j = first; j < n; j += W) {
    const int64_t below = std::min<int64_t>(W, n - j);
    for (int g = 0; g < R; g += W) {
      Vec<T> rows[W];
      for (int r = 0; r < W; ++r)
        rows[r] = g + r < R ? load<T>(strip + (g + r) * strip_stride + j) : Vec<T>{};
      transpose<T>(rows);
      for (int64_t c = 0; c < below; ++c) {
        T* to = square + (j + c) * stride + column + g;
        if (!EXACT || R - g >= W) {
          store<T>(to, rows[c]);
        } else {
          store_lanes<T, kRest>(to, rows[c]);
        }
      }
    }
  }
}

// Whole symmetric heads [begin, end). Half of the matrix of powers (of logits where rows need their own
// shift) and its mirror image go to scratch memory while that stays small, else straight to the output.
template <class T>
void forward_heads(const SelfRelation& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const int64_t n = op.rows, k = op.depth, padded = round_up(n, R), width = round_up(n, C) + W;
  const bool in_place = !keeps_head_in_scratch(n, sizeof(T));
  const T factor = static_cast<T>(op.scale * 1.4426950408889634);
  const int64_t square_size = (in_place ? R : padded) * width;
  Scratch scratch(Scratch::bytes_of<T>(strips_size<T>(n, k)) + Scratch::bytes_of<T>(width * k) +
                  Scratch::bytes_of<T>(square_size));
  T* a = scratch.take<T>(strips_size<T>(n, k));
  T* b = scratch.take<T>(width * k);
  T* square = scratch.take<T>(square_size);
  for (int64_t h = begin; h < end; ++h) {
    const void* x = element(op.x, h / op.heads, h % op.heads);
    pack_rows<T, C>(b, x, op.x, n, k, op.normalize);
    for (int64_t i = 0; i < n; i += R) strip_of_panels<T>(b, n, k, i, strip_at<T>(a, i, k));
    const T shift = shared_shift<T, C>(b, n, k, factor);
    T* out = static_cast<T*>(op.relation) + h * n * n;  // in place only
    for (int64_t j = 0; j < n; j += C) {  // one panel of b stays in the first-level cache for all strips
      const int64_t to = std::min<int64_t>(n, j + C);
      for (int64_t i = 0; i < to; i += R) {
        const int64_t count = std::min<int64_t>(R, n - i), from = std::max(j, i / W * W);
        T* strip = in_place ? square : square + i * width;
        strip_product<T>(k, strip_at<T>(a, i, k), b, from, to, strip, width);
        if (shift == shift) {
          for (int64_t r = 0; r < count; ++r)
            powers_of_row<T>(strip + r * width, strip + r * width, from, to, factor, shift);
        }
        if (in_place) {
          const int64_t right = std::max(i, j);
          for (int64_t r = 0; r < count; ++r)
            std::memcpy(out + (i + r) * n + right, strip + r * width + right, (to - right) * sizeof(T));
          mirror<T, true>(strip, width, std::max(i + R, j), to, out, n, i);
        } else if (i < j && j < i + R) {
          // The panel's edge cuts the strip's own square, whose rows must stay whole.
          mirror<T, true>(strip, width, j, to, square, width, i);
        } else {
          mirror<T, false>(strip, width, std::max(i + R, j), to, square, width, i);
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      T* row = in_place ? square : square + i * width;
      if (in_place) std::memcpy(row, out + i * n, n * sizeof(T));
      if (shift != shift) powers_of_row<T>(row, row, 0, n, factor, shift);
      divide_rows<T>(op, row, 0, h * n + i, 1);
    }
  }
}

// Strips [begin, end) of all heads in a row, whole rows of the Gram matrix each: with columns, or where there
// are too few heads to give each thread its own.
template <class T>
void forward_strips(const SelfRelation& op, int64_t begin, int64_t end) {
  constexpr int R = kTileRows, C = kTileColumns<T>;
  const int64_t n = op.rows, m = op.columns, k = op.depth, width = round_up(m, C), strips = ceil_div(n, R);
  const T factor = static_cast<T>(op.scale * 1.4426950408889634);
  Scratch scratch(Scratch::bytes_of<T>(kStripStride<T> * k) + Scratch::bytes_of<T>(width * k) +
                  Scratch::bytes_of<T>(R * width));
  T* a = scratch.take<T>(kStripStride<T> * k);
  T* b = scratch.take<T>(width * k);
  T* strip = scratch.take<T>(R * width);
  T shift = std::numeric_limits<T>::quiet_NaN();
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item / strips, i = item % strips * R, count = std::min<int64_t>(R, n - i);
    if (h != packed) {
      pack_rows<T, C>(b, element(op.y, h / op.heads, h % op.heads), op.y, m, k, op.normalize);
      if (op.symmetric) shift = shared_shift<T, C>(b, m, k, factor);  // the same bits as forward_heads
      packed = h;
    }
    pack_rows<T, R>(a, element(op.x, h / op.heads, h % op.heads, i), op.x, count, k, op.normalize);
    strip_product<T>(k, a, b, 0, m, strip, width);
    for (int64_t r = 0; r < count; ++r)
      powers_of_row<T>(strip + r * width, strip + r * width, 0, m, factor, shift);
    divide_rows<T>(op, strip, width, h * n + i, count);
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
