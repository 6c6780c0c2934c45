// self_relation's backward on the CPU, without any matrix of the relation's size. Included by
// self_relation.h, once per instruction set.
//
// dS_ij = A_ij ((G_ij − g_i) − δ_i), δ_i = Σ_j A_ij (G_ij − g_i) / Σ_j A_ij, for any g_i, and
//   symmetric  dX = scale · (dS + dSᵀ) X, one product;     else  dX = scale · dS Y,  dY = scale · dSᵀ X.
// Strips of dS (+ dSᵀ) are made as panels of the product and thrown away.
//
// Saturated rows, where one A_ij is almost 1, keep their gradient too: the sum of A is 1 but for its
// rounding, and dividing by it keeps the rows of dS at zero sum; and with g_i = G_ij of that j, whose own
// difference is then exactly zero, nothing cancels. Elsewhere g_i is 0.

namespace fastssl::cpu::FASTSSL_ISA {

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

// The two numbers of each row, in op.offsets: g and δ.
template <class T>
struct Offset {
  T g, delta;
};

// Above this share of a row, one element's G becomes the row's g: below it at most two digits cancel.
constexpr double kSaturated = 0.98;

// The G of the row's element A = `largest`.
template <class T, class S>
T gradient_at(const Pair<T, S>& pair, int64_t row, T largest) {
  int64_t j = 0;
  while (j + 1 < pair.columns && static_cast<T>(widen_one(pair.relation[row * pair.columns + j])) != largest)
    ++j;
  return static_cast<T>(widen_one(pair.grad[row * pair.grad_row + j * pair.grad_column]));
}

// g and δ of rows [begin, end) of all heads in a row.
template <class T, class S>
void row_offsets(const SelfRelation& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth;
  Offset<T>* offsets = static_cast<Offset<T>*>(op.offsets);
  const int64_t whole = op.columns / W * W, rest = op.columns - whole;
  for (int64_t item = begin; item < end; ++item) {
    const Pair<T, S> pair(op, item / op.rows);
    const int64_t row = item % op.rows;
    Vec<T> products{}, total{}, largest{}, a, g;
    for (int64_t j = 0; j < whole; j += W) {
      pair.template load<false>(row, j, W, a, g);
      products += a * g;
      total += a;
      largest = max<T>(largest, a);
    }
    if (rest > 0) {
      pair.template load<false>(row, whole, rest, a, g);
      products += keep_lanes<T>(a * g, rest, T{0});
      a = keep_lanes<T>(a, rest, T{0});
      total += a;
      largest = max<T>(largest, a);
    }
    const T sum = sum_lanes<T>(total), most = max_lanes<T>(largest);
    Offset<T>& offset = offsets[item];
    offset.g = T{0};
    if (most > T(kSaturated) * sum) {
      offset.g = gradient_at(pair, row, most);
      products = Vec<T>{};
      for (int64_t j = 0; j < whole; j += W) {
        pair.template load<false>(row, j, W, a, g);
        products += a * (g - offset.g);
      }
      if (rest > 0) {
        pair.template load<false>(row, whole, rest, a, g);
        products += keep_lanes<T>(a * (g - offset.g), rest, T{0});
      }
    }
    offset.delta = sum_lanes<T>(products) / sum;
  }
}

// One block of a panel: W elements of depth from k on, for LANES lanes from `lane` on. WHOLE: every vector of
// the block may be read as it stands; else `lanes` and `deep` say how much of the block there is.
template <class T, class S, bool BY_ROW, bool BY_COLUMN, int LANES, bool WHOLE>
FASTSSL_INLINE void gradient_block(const Pair<T, S>& pair, const Offset<T>* offsets, int64_t lane,
                                   int64_t lanes, int64_t k, int64_t deep, T* panel) {
  constexpr int W = Simd<T>::kWidth;
  Vec<T> rows[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    rows[r] = Vec<T>{};
    if (BY_ROW && r < LANES && (WHOLE || r < lanes)) {
      Vec<T> a, gradient;
      pair.template load<WHOLE>(lane + r, k, deep, a, gradient);
      rows[r] = a * (gradient - offsets[lane + r].g - offsets[lane + r].delta);
    }
  }
  if (BY_ROW) transpose<T>(rows);
#pragma GCC unroll 16
  for (int c = 0; c < W; ++c) {
    if (!WHOLE && c >= deep) break;
    if (BY_COLUMN && (WHOLE || lanes > 0)) {
      Vec<T> a, gradient;
      pair.template load<WHOLE>(k + c, lane, lanes, a, gradient);
      rows[c] += a * (gradient - offsets[k + c].g - offsets[k + c].delta);
    }
    store<T>(panel + c * kStripStride<T>, rows[c]);
  }
}

// The lanes of one vector of a panel, from lane G on, and those of the vectors after it.
template <class T, class S, bool BY_ROW, bool BY_COLUMN, int G = 0>
FASTSSL_INLINE void gradient_blocks(const Pair<T, S>& pair, const Offset<T>* offsets, int64_t first,
                                    int64_t count, int64_t k, int64_t deep, T* panel) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, LANES = std::min(W, R - G);
  const int64_t lanes = std::clamp<int64_t>(count - G, 0, LANES);
  const bool whole = lanes == LANES && deep == W && pair.alike &&
                     (!BY_COLUMN || (k + W - 1) * pair.columns + first + G + W <= pair.readable);
  if (whole) {
    gradient_block<T, S, BY_ROW, BY_COLUMN, LANES, true>(pair, offsets, first + G, lanes, k, deep, panel + G);
  } else {
    gradient_block<T, S, BY_ROW, BY_COLUMN, LANES, false>(pair, offsets, first + G, lanes, k, deep,
                                                          panel + G);
  }
  if constexpr (G + W < R)
    gradient_blocks<T, S, BY_ROW, BY_COLUMN, G + W>(pair, offsets, first, count, k, deep, panel);
}

// panel[k][lane] for lanes first … first + count: dS_lane,k where BY_ROW, plus dS_k,lane where BY_COLUMN.
template <class T, class S, bool BY_ROW, bool BY_COLUMN>
void gradient_panel(const Pair<T, S>& pair, const Offset<T>* offsets, int64_t first, int64_t count,
                    int64_t depth, T* panel) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t k = 0; k < depth; k += W) {
    const int64_t deep = std::min<int64_t>(W, depth - k);
    gradient_blocks<T, S, BY_ROW, BY_COLUMN>(pair, offsets, first, count, k, deep,
                                             panel + k * kStripStride<T>);
  }
}

// Strips [begin, end) of all heads in a row, of the gradient of x (BY_ROW) or of the columns.
template <class T, class S, bool BY_ROW, bool BY_COLUMN>
void gradient_strips(const SelfRelation& op, int64_t begin, int64_t end) {
  constexpr int R = kTileRows;
  const Strided& target = BY_ROW ? op.x : op.y;  // what the gradient is taken of
  const Strided& other = BY_COLUMN ? op.x : op.y;
  const Strided& out = BY_ROW ? op.grad_x : op.grad_y;
  const int64_t rows = BY_ROW ? op.rows : op.columns, depth = BY_COLUMN ? op.rows : op.columns;
  const int64_t strips = ceil_div(rows, R);
  GradientStrips<T> gradient(depth, op.depth, op.normalize);
  T* panel = nullptr;
  const auto lay_out = [&](auto&& take) {
    take(panel, kStripStride<T> * depth);
    gradient.lay_out(take);
  };
  size_t bytes = 0;
  lay_out([&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  lay_out([&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  const T scale = static_cast<T>(op.scale);
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item / strips, i = item % strips * R, count = std::min<int64_t>(R, rows - i);
    const int64_t batch = h / op.heads, head = h % op.heads;
    if (h != packed) gradient.pack_factor(other, batch, head);
    packed = h;
    const Pair<T, S> pair(op, h);
    gradient_panel<T, S, BY_ROW, BY_COLUMN>(pair, static_cast<const Offset<T>*>(op.offsets) + h * op.rows, i,
                                            count, depth, panel);
    gradient.multiply(panel, count);
    for (int64_t e = 0; e < count * gradient.width; ++e) gradient.product[e] *= scale;
    gradient.store(target, out, batch, head, i, count);
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
