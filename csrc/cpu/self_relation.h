// self_relation on the CPU: Gram matrix and softmax of one (image, head), and the backward without any matrix
// of that size. Included once per instruction set by foreach_isa.h.
//
// S = X Yᵀ in strips of kTileRows rows, A = softmax(scale · S) by rows while the strip is in cache, as powers
// of two: A_ij = E_ij / Σ_j E_ij, E_ij = 2^(f·S_ij − c_i), f = scale · log2(e). Without columns S is
// symmetric, and one shift c for the whole head keeps E symmetric: only tiles on and above the diagonal are
// computed, their transposes are copied. The shift is the largest f·S_ii, which no f·S_ij exceeds; every row
// holds its own 2^(f·S_ii − c), so that it is safe where the diagonal's spread is small. Elsewhere c_i is the
// row's maximum.
//
// Backward: δ_i = Σ_j A_ij G_ij / Σ_j A_ij, dS_ij = A_ij (G_ij − δ_i), and
//   symmetric  dX = scale · (dS + dSᵀ) X, one product;     else  dX = scale · dS Y,  dY = scale · dSᵀ X.
// Strips of dS (+ dSᵀ) are made as panels of the product and thrown away. The sum of A is 1 but for its
// rounding; dividing by it keeps the rows of dS at zero sum, which saves the gradient of saturated rows in
// half precision.

namespace fastssl::cpu::FASTSSL_ISA {

// ---- lengths of vectors
// ----------------------------------------------------------------------------------------

// Divides every lane of packed panels by its length; a vector of length at most kNoLength becomes zero.
constexpr double kNoLength = 1e-12;

template <class T, int LANES>
void inverse_lengths(const T* panel, int64_t depth, T* inverse) {
  T squares[LANES] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int l = 0; l < LANES; ++l) squares[l] += panel[k * LANES + l] * panel[k * LANES + l];
  for (int l = 0; l < LANES; ++l)
    inverse[l] = squares[l] > T(kNoLength * kNoLength) ? T(1) / std::sqrt(squares[l]) : T(0);
}
template <class T, int LANES>
void normalize_panels(T* panels, int64_t vectors, int64_t depth) {
  for (int64_t first = 0; first < vectors; first += LANES, panels += depth * LANES) {
    T inverse[LANES];
    inverse_lengths<T, LANES>(panels, depth, inverse);
    for (int64_t k = 0; k < depth; ++k)
      for (int l = 0; l < LANES; ++l) panels[k * LANES + l] *= inverse[l];
  }
}
// Packs the rows of one head as lanes, divided by their lengths where asked.
template <class T, int LANES>
void pack_rows(T* out, const void* in, const Strided& m, int64_t rows, int64_t depth, bool normalize) {
  pack<T, LANES>(out, in, m.dtype, m.row_stride, m.column_stride, rows, depth);
  if (normalize) normalize_panels<T, LANES>(out, rows, depth);
}

// ---- forward
// ---------------------------------------------------------------------------------------------------

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
  const bool safe = factor > 0 && factor * (highest - lowest) <= T(16);  // false for NaN and infinity
  return safe ? factor * highest : std::numeric_limits<T>::quiet_NaN();
}

// powers[j] = 2^(factor·s_j − shift) for j in [from, n), `from` a multiple of the vector width; a NaN shift
// means the row's own maximum. Both are read and written in whole vectors: what stands past n is nobody's.
// powers may be s.
template <class T>
FASTSSL_INLINE void powers_of_row(const T* s, T* powers, int64_t from, int64_t n, T factor, T shift) {
  constexpr int W = Simd<T>::kWidth;
  if (shift != shift) {
    const int64_t whole = (n - 1) / W * W;
    Vec<T> best = keep_lanes<T>(load<T>(s + whole) * factor, n - whole, -std::numeric_limits<T>::infinity());
    for (int64_t j = from; j < whole; j += W) best = max<T>(best, load<T>(s + j) * factor);
    shift = max_lanes<T>(best);
  }
  for (int64_t j = from; j < n; j += W) store<T>(powers + j, exp2(load<T>(s + j) * factor - shift));
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
  Scratch scratch(Scratch::bytes_of<T>(padded * k + W) + Scratch::bytes_of<T>(width * k) +
                  Scratch::bytes_of<T>(square_size));
  T* a = scratch.take<T>(padded * k + W);
  T* b = scratch.take<T>(width * k);
  T* square = scratch.take<T>(square_size);
  for (int64_t h = begin; h < end; ++h) {
    const void* x = element(op.x, h / op.heads, h % op.heads);
    pack_rows<T, R>(a, x, op.x, n, k, op.normalize);
    pack_rows<T, C>(b, x, op.x, n, k, op.normalize);
    const T shift = shared_shift<T, C>(b, n, k, factor);
    T* out = static_cast<T*>(op.relation) + h * n * n;  // in place only
    for (int64_t j = 0; j < n; j += C) {  // one panel of b stays in the first-level cache for all strips
      const int64_t to = std::min<int64_t>(n, j + C);
      for (int64_t i = 0; i < to; i += R) {
        const int64_t count = std::min<int64_t>(R, n - i), from = std::max(j, i / W * W);
        T* strip = in_place ? square : square + i * width;
        strip_product<T>(k, a + i * k, b, from, to, strip, width);
        if (shift == shift) {
          for (int64_t r = 0; r < count; ++r)
            powers_of_row<T>(strip + r * width, strip + r * width, from, to, factor, shift);
        }
        if (in_place) {
          const int64_t right = std::max(i, j);
          for (int64_t r = 0; r < count; ++r)
            std::memcpy(out + (i + r) * n + right, strip + r * width + right, (to - right) * sizeof(T));
          mirror<T, true>(strip, width, std::max(i + R, j), to, out, n, i);
        } else if (i < j &&
                   j < i + R) {  // the panel's edge cuts the strip's own square: its rows must stay whole
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
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const int64_t n = op.rows, m = op.columns, k = op.depth, width = round_up(m, C), strips = ceil_div(n, R);
  const T factor = static_cast<T>(op.scale * 1.4426950408889634);
  Scratch scratch(Scratch::bytes_of<T>(R * k + W) + Scratch::bytes_of<T>(width * k) +
                  Scratch::bytes_of<T>(R * width));
  T* a = scratch.take<T>(R * k + W);
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

// ---- backward
// --------------------------------------------------------------------------------------------------

// A and G = dA as rows of S elements; G may have any strides.
template <class T, class S>
struct Pair {
  const S* relation;
  const S* grad;
  int64_t columns, grad_row, grad_column, readable;  // readable: elements of `relation` that may be read
  bool plain, alike;  // grad's rows are contiguous; all of grad lies like relation

  Pair(const SelfRelation& op, int64_t h)
      : relation(static_cast<const S*>(op.relation) + h * op.rows * op.columns),
        grad(static_cast<const S*>(element(op.grad, h / op.heads, h % op.heads))),
        columns(op.columns),
        grad_row(op.grad.row_stride),
        grad_column(op.grad.column_stride),
        readable((op.batch * op.heads - h) * op.rows * op.columns),
        plain(grad_column == 1),
        alike(plain && grad_row == op.columns && op.grad.head_stride == op.rows * op.columns &&
              op.grad.batch_stride == op.heads * op.rows * op.columns) {}

  // Lanes A_ij, G_ij for j = column … column + W; those past `count` are whatever can be read without harm.
  // WHOLE: the caller knows that the vectors may be read and that grad lies like relation.
  template <bool WHOLE>
  FASTSSL_INLINE void load(int64_t row, int64_t column, int64_t count, Vec<T>& a, Vec<T>& g) const {
    constexpr int W = Simd<T>::kWidth;
    const int64_t offset = row * columns + column;
    if constexpr (WHOLE) {
      a = load_any<T>(relation + offset);
      g = load_any<T>(grad + offset);
      return;
    }
    const bool whole = offset + W <= readable;
    if (whole) {
      a = load_any<T>(relation + offset);
    } else {
      a = load_part<T>(relation + offset, count, T{0});
    }
    const S* from = grad + row * grad_row + column * grad_column;
    if ((alike && whole) || (plain && count >= W)) {
      g = load_any<T>(from);
    } else {
      g = load_strided<T>(from, grad_column, count);
    }
  }
};

// δ of rows [begin, end) of all heads in a row.
template <class T, class S>
void row_dots(const SelfRelation& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth;
  T* dots = static_cast<T*>(op.dots);
  for (int64_t item = begin; item < end; ++item) {
    const Pair<T, S> pair(op, item / op.rows);
    const int64_t row = item % op.rows, whole = op.columns / W * W;
    Vec<T> products{}, total{}, a, g;
    for (int64_t j = 0; j < whole; j += W) {
      pair.template load<false>(row, j, W, a, g);
      products += a * g;
      total += a;
    }
    if (whole < op.columns) {
      pair.template load<false>(row, whole, op.columns - whole, a, g);
      const int64_t rest = op.columns - whole;
      products += keep_lanes<T>(a * g, rest, T{0});
      total += keep_lanes<T>(a, rest, T{0});
    }
    dots[item] = sum_lanes<T>(products) / sum_lanes<T>(total);
  }
}

// One block of a panel: W elements of depth from k on, for LANES lanes from `lane` on. WHOLE: every vector of
// the block may be read as it stands; else `lanes` and `deep` say how much of the block there is.
template <class T, class S, bool BY_ROW, bool BY_COLUMN, int LANES, bool WHOLE>
FASTSSL_INLINE void gradient_block(const Pair<T, S>& pair, const T* dots, int64_t lane, int64_t lanes,
                                   int64_t k, int64_t deep, T* panel) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows;
  Vec<T> rows[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    rows[r] = Vec<T>{};
    if (BY_ROW && r < LANES && (WHOLE || r < lanes)) {
      Vec<T> a, gradient;
      pair.template load<WHOLE>(lane + r, k, deep, a, gradient);
      rows[r] = a * (gradient - dots[lane + r]);
    }
  }
  if (BY_ROW) transpose<T>(rows);
#pragma GCC unroll 16
  for (int c = 0; c < W; ++c) {
    if (!WHOLE && c >= deep) break;
    if (BY_COLUMN && (WHOLE || lanes > 0)) {
      Vec<T> a, gradient;
      pair.template load<WHOLE>(k + c, lane, lanes, a, gradient);
      rows[c] += a * (gradient - dots[k + c]);
    }
    T* to = panel + c * R;
    if (LANES == W || R < W) {  // what is too much, the next store replaces
      store<T>(to, rows[c]);
    } else {
      store_lanes<T, LANES>(to, rows[c]);
    }
  }
}

// The lanes of one vector of a panel, from lane G on, and those of the vectors after it.
template <class T, class S, bool BY_ROW, bool BY_COLUMN, int G = 0>
FASTSSL_INLINE void gradient_blocks(const Pair<T, S>& pair, const T* dots, int64_t first, int64_t count,
                                    int64_t k, int64_t deep, T* panel) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, LANES = std::min(W, R - G);
  const int64_t lanes = std::clamp<int64_t>(count - G, 0, LANES);
  const bool whole = lanes == LANES && deep == W && pair.alike &&
                     (!BY_COLUMN || (k + W - 1) * pair.columns + first + G + W <= pair.readable);
  if (whole) {
    gradient_block<T, S, BY_ROW, BY_COLUMN, LANES, true>(pair, dots, first + G, lanes, k, deep, panel + G);
  } else {
    gradient_block<T, S, BY_ROW, BY_COLUMN, LANES, false>(pair, dots, first + G, lanes, k, deep, panel + G);
  }
  if constexpr (G + W < R)
    gradient_blocks<T, S, BY_ROW, BY_COLUMN, G + W>(pair, dots, first, count, k, deep, panel);
}

// panel[k][lane] for lanes first … first + count: dS_lane,k where BY_ROW, plus dS_k,lane where BY_COLUMN.
template <class T, class S, bool BY_ROW, bool BY_COLUMN>
void gradient_panel(const Pair<T, S>& pair, const T* dots, int64_t first, int64_t count, int64_t depth,
                    T* panel) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows;
  for (int64_t k = 0; k < depth; k += W) {
    const int64_t deep = std::min<int64_t>(W, depth - k);
    gradient_blocks<T, S, BY_ROW, BY_COLUMN>(pair, dots, first, count, k, deep, panel + k * R);
  }
}

// Through the division by the length: dx = (ĝ − x̂ (x̂ · ĝ)) / |x|, one row at a time.
template <class T, class S>
void through_length(const S* x, int64_t stride, int64_t depth, T inverse, T* grad) {
  T dot = 0;
  for (int64_t k = 0; k < depth; ++k) dot += grad[k] * static_cast<T>(widen_one(x[k * stride])) * inverse;
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

// Strips [begin, end) of all heads in a row, of the gradient of x (BY_ROW) or of the columns.
template <class T, class S, bool BY_ROW, bool BY_COLUMN>
void gradient_strips(const SelfRelation& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const Strided& target = BY_ROW ? op.x : op.y;  // what the gradient is taken of
  const Strided& other = BY_COLUMN ? op.x : op.y;
  const Strided& out = BY_ROW ? op.grad_x : op.grad_y;
  const int64_t rows = BY_ROW ? op.rows : op.columns, depth = BY_COLUMN ? op.rows : op.columns;
  const int64_t k = op.depth, width = round_up(k, C), strips = ceil_div(rows, R);
  const int64_t lengths = op.normalize ? round_up(depth, C) : 0;
  Scratch scratch(Scratch::bytes_of<T>(R * depth + W) + Scratch::bytes_of<T>(depth * width) +
                  Scratch::bytes_of<T>(R * width) + Scratch::bytes_of<T>(lengths) +
                  Scratch::bytes_of<T>(op.normalize ? k * C + W : 0));
  T* panel = scratch.take<T>(R * depth + W);
  T* b = scratch.take<T>(depth * width);
  T* strip = scratch.take<T>(R * width);
  T* inverse = scratch.take<T>(lengths);
  T* vectors = scratch.take<T>(op.normalize ? k * C + W : 0);
  const T scale = static_cast<T>(op.scale);
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item / strips, i = item % strips * R, count = std::min<int64_t>(R, rows - i);
    const int64_t batch = h / op.heads, head = h % op.heads;
    if (h != packed) {
      // Lanes are the depth of the relation here: the product runs over tokens (or channels).
      pack<T, C>(b, element(other, batch, head), other.dtype, other.column_stride, other.row_stride, k,
                 depth);
      if (op.normalize) {
        for (int64_t j = 0; j < depth; j += C) {
          const int64_t some = std::min<int64_t>(C, depth - j);
          pack<T, C>(vectors, element(other, batch, head, j), other.dtype, other.row_stride,
                     other.column_stride, some, k);
          inverse_lengths<T, C>(vectors, k, inverse + j);
        }
        for (int64_t p = 0; p < width; p += C)
          for (int64_t j = 0; j < depth; ++j)
            for (int l = 0; l < C; ++l) b[p * depth + j * C + l] *= inverse[j];
      }
      packed = h;
    }
    const Pair<T, S> pair(op, h);
    gradient_panel<T, S, BY_ROW, BY_COLUMN>(pair, static_cast<const T*>(op.dots) + h * op.rows, i, count,
                                            depth, panel);
    strip_product<T>(depth, panel, b, 0, k, strip, width);
    for (int64_t e = 0; e < count * width; ++e) strip[e] *= scale;
    if (op.normalize) {
      T own[R];
      const void* x = element(target, batch, head, i);
      pack<T, R>(vectors, x, target.dtype, target.row_stride, target.column_stride, count, k);
      inverse_lengths<T, R>(vectors, k, own);
      through_lengths<T>(x, target, count, k, own, strip, width);
    }
    store_strip<T>(strip, width, count, k, out, batch, head, i);
  }
}

// ---- what self_relation.cpp calls
// ------------------------------------------------------------------------------

template <class T, class S>
struct Backward {
  static void strips(const SelfRelation& op, bool of_columns, int64_t begin, int64_t end) {
    if (op.symmetric) {
      gradient_strips<T, S, true, true>(op, begin, end);
    } else if (!of_columns) {
      gradient_strips<T, S, true, false>(op, begin, end);
    } else {
      gradient_strips<T, S, false, true>(op, begin, end);
    }
  }
  static constexpr BackwardKernels kernels{row_dots<T, S>, strips};
};

inline BackwardKernels backward_kernels(bool in_double, Dtype relation) {
  switch (relation) {
    case Dtype::kDouble:
      return Backward<double, double>::kernels;
    case Dtype::kFloat:
      return in_double ? Backward<double, float>::kernels : Backward<float, float>::kernels;
    case Dtype::kBFloat16:
      return in_double ? Backward<double, BFloat16Bits>::kernels : Backward<float, BFloat16Bits>::kernels;
    default:
      return in_double ? Backward<double, HalfBits>::kernels : Backward<float, HalfBits>::kernels;
  }
}

inline ForwardKernels forward_kernels(bool in_double) {
  if (in_double) return {forward_heads<double>, forward_strips<double>, kTileRows};
  return {forward_heads<float>, forward_strips<float>, kTileRows};
}

}  // namespace fastssl::cpu::FASTSSL_ISA
