// self_relation_loss on the CPU in one pass over student and teacher: loss and gradient of one head, whose
// matrix dS stays in a core's cache. Included by self_relation_loss.h, once per instruction set.
//
// Without columns S and T are symmetric, and one shift c for the whole head keeps E_ij = 2^(f·S_ij − c)
// symmetric. Then only tiles on and below the diagonal are computed; each element counts for its row and for
// its column. The pivot of every row is its diagonal element. With r_i = Σ_j E_ij of the student, F its
// counterpart and q_i = Σ_j F_ij,
//   W_ij = E_ij (1/r_i + 1/r_j) − F_ij (1/q_i + 1/q_j),  W_ii = −2 Σ_{j≠i} (E_ij/r_i − F_ij/q_i),
//   dX = w·s_s·W X.
// Where logits spread too far for one shift or others stand far above the diagonal, and with columns, rows
// are worked on one by one.

namespace fastssl::cpu::FASTSSL_ISA {

// The squared length of every packed vector, summed as `tile` sums.
template <class T, int LANES>
void diagonal_of(const T* panels, int64_t vectors, int64_t depth, T* out) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t first = 0; first < vectors; first += LANES, panels += depth * LANES) {
    for (int v = 0; v < LANES; v += W) {
      Vec<T> total{};
      for (int64_t k = 0; k < depth;) {
        Vec<T> sum{};
        for (const int64_t end = std::min(depth, k + kChunk); k < end; ++k) {
          const Vec<T> x = load<T>(panels + k * LANES + v);
          sum += x * x;
        }
        total += sum;
      }
      store<T>(out + first + v, total);
    }
  }
}

// The shift c of one head, or NaN where rows must have their own: every row holds its own 2^(f·S_ii − c),
// which must not be lost, and the rounding of f·S − c must stay near that of S itself.
template <class T>
T shift_of(const T* diagonal, int64_t n, T factor) {
  const auto [lowest, highest] = std::minmax_element(diagonal, diagonal + n);
  const bool safe = factor > 0 && factor * *highest <= T(256) && factor * (*highest - *lowest) <= T(32);
  return safe ? factor * *highest : std::numeric_limits<T>::quiet_NaN();
}

// Scratch memory of one head. Rows of the square are an odd number of vectors apart, or columns would share
// few places of the first-level cache.
template <class T>
struct LossHead {
  static constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  int64_t n, m, stride, width, padded;
  T *a = nullptr, *b = nullptr;           // packed rows and columns; b also the right factor of the gradient
  T* square = nullptr;                    // T, then E below the diagonal; or S, then dS or W
  T* triangle = nullptr;                  // F below the diagonal
  T *strip = nullptr, *powers = nullptr;  // strips of products; a row's powers
  T* panel = nullptr;                     // the left factor of the gradient
  T *vectors = nullptr, *inverse = nullptr;                                 // for lengths
  T *student, *teacher, *e, *f, *apart, *of_student, *of_teacher, *corner;  // one number per row
  Vec<T>* sums = nullptr;  // three vectors per row, whose lanes make e, f and apart

  explicit LossHead(const SelfRelationLoss& op)
      : n(op.rows), m(op.columns), stride(round_up(m, W)), width(round_up(m, C)), padded(round_up(n, W)) {
    if (stride / W % 2 == 0) stride += W;
  }

  // take(pointer, count) for every piece: once to count their bytes, once to place them.
  template <class Take>
  void lay_out(const SelfRelationLoss& op, Take&& take) {
    const int64_t depth = std::max(op.student.depth, op.teacher.depth), most = std::max(n, m);
    const int64_t rows = round_up(padded, R) + R, numbers = round_up(n, C) + C;
    take(a, strips_size<T>(n, depth));
    take(b, std::max(round_up(most, C) * depth + W, most * round_up(op.student.depth, C)));
    take(square, rows * stride + C);
    take(triangle, op.symmetric ? padded * (padded + W) / 2 + C : 0);
    take(strip, R * std::max(width, round_up(op.student.depth, C)));
    take(powers, width);
    take(panel, most * kStripStride<T>);
    take(vectors, op.normalize ? depth * std::max(C, kStripStride<T>) : 0);
    take(inverse, op.normalize ? round_up(most, C) : 0);
    for (T** pointer : {&student, &teacher, &e, &f, &apart, &of_student, &of_teacher, &corner})
      take(*pointer, numbers);
    T* lanes = nullptr;
    take(lanes, 3 * W * n);
    sums = reinterpret_cast<Vec<T>*>(lanes);
  }

  T* row(int64_t i) const { return square + i * stride; }
  // Row i of the triangle, whole vectors up to its diagonal.
  T* triangle_row(int64_t i) const {
    const int64_t block = i / W;
    return triangle + block * (block + 1) / 2 * W * W + i % W * (block + 1) * W;
  }
};

// The diagonal is a good pivot of rows whose other elements stand at most this far above it. With one that is
// far above it, what makes a small loss would cancel.
template <class T>
constexpr T kDominant = T(4);

// How logits become powers of two: factor and shift of student and teacher.
template <class T>
struct Shifts {
  T student_factor, student_shift, teacher_factor, teacher_shift;
};

// ROWS rows of a symmetric head, whose diagonal lies in one vector, in one panel: S becomes E, T becomes F,
// and both are summed by rows and by columns. From the diagonal on they are zero.
// Returns how far an E_ij stands above kDominant times E_ii or E_jj, where one does.
template <class T, int ROWS>
FASTSSL_INLINE Vec<T> symmetric_rows(const LossHead<T>& head, const Shifts<T>& shifts, int64_t row,
                                     const T* s, int64_t from, int64_t to) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t last = row / W * W;
  T *t = head.row(row), *f_row = head.triangle_row(row);
  Vec<T> sums[ROWS][3], own[ROWS], limit[ROWS], excess{};
  for (int r = 0; r < ROWS; ++r) {
    own[r] = broadcast<T>(head.student[row + r]);
    limit[r] = broadcast<T>(head.corner[row + r]);
    for (int c = 0; c < 3; ++c) sums[r][c] = head.sums[3 * (row + r) + c];
  }
  for (int64_t j = from; j <= last && j < to; j += W) {
    Vec<T> e_column = load<T>(head.e + j), f_column = load<T>(head.f + j), apart = load<T>(head.apart + j);
    const Vec<T> other = load<T>(head.student + j), other_limit = load<T>(head.corner + j);
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> product = load<T>(s + r * head.width + j);
      Vec<T> e = exp2(product * shifts.student_factor - shifts.student_shift);
      Vec<T> f = exp2(load<T>(t + r * head.stride + j) * shifts.teacher_factor - shifts.teacher_shift);
      if (j == last) {
        e = keep_lanes<T>(e, row + r - last, T{0});
        f = keep_lanes<T>(f, row + r - last, T{0});
      }
      store<T>(t + r * head.stride + j, e);
      store<T>(f_row + r * (last + W) + j, f);
      excess = max<T>(excess, e - (limit[r] < other_limit ? limit[r] : other_limit));
      sums[r][0] += e;
      sums[r][1] += f;
      sums[r][2] += f * (own[r] - product);
      e_column += e;
      f_column += f;
      apart += f * (other - product);
    }
    store<T>(head.e + j, e_column);
    store<T>(head.f + j, f_column);
    store<T>(head.apart + j, apart);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < 3; ++c) head.sums[3 * (row + r) + c] = sums[r][c];
  return excess;
}

// The rows of one strip, by twos where they can be.
template <class T>
FASTSSL_INLINE Vec<T> symmetric_strip(const LossHead<T>& head, const Shifts<T>& shifts, int64_t i,
                                      int64_t from, int64_t to) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t end = std::min<int64_t>(head.n, i + kTileRows);
  Vec<T> excess{};
  for (int64_t row = i; row < end;) {
    const T* s = head.strip + (row - i) * head.width;
    if (row + 1 < end && (row + 1) % W != 0) {
      excess = max<T>(excess, symmetric_rows<T, 2>(head, shifts, row, s, from, to));
      row += 2;
    } else {
      excess = max<T>(excess, symmetric_rows<T, 1>(head, shifts, row, s, from, to));
      ++row;
    }
  }
  return excess;
}

// W_ij of one row i and the columns j … j + W, below the diagonal.
template <class T>
FASTSSL_INLINE Vec<T> symmetric_weights(const LossHead<T>& head, int64_t i, int64_t j) {
  const Vec<T> e = load<T>(head.row(i) + j), f = load<T>(head.triangle_row(i) + j);
  return e * (load<T>(head.of_student + j) + head.of_student[i]) -
         f * (load<T>(head.of_teacher + j) + head.of_teacher[i]);
}

// Columns [i, i + R) of W as a panel, made of E and F, which lie below the diagonal alone: what is left of
// the strip's own square by transposing rows, what is below it as it stands.
template <class T>
void panel_of_weights(const LossHead<T>& head, int64_t i, T* panel) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, STRIDE = kStripStride<T>;
  const int64_t count = std::min<int64_t>(R, head.n - i);
  for (int lane = 0; lane < R; lane += W) {
    const int64_t here = std::min<int64_t>(W, count - lane);
    for (int64_t k = 0; k < i; k += W) {
      Vec<T> rows[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) rows[r] = r < here ? symmetric_weights<T>(head, i + lane + r, k) : Vec<T>{};
      transpose<T>(rows);
      const int64_t deep = std::min<int64_t>(W, i - k);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        if (r < deep) store<T>(panel + (k + r) * STRIDE + lane, rows[r]);
    }
  }
  T own[R][R];
  for (int64_t r = 0; r < count; ++r) {
    T row[STRIDE];
    for (int lane = 0; lane < R; lane += W) store<T>(row + lane, symmetric_weights<T>(head, i + r, i + lane));
    for (int64_t c = 0; c < r; ++c) own[r][c] = own[c][r] = row[c];
    own[r][r] = head.corner[i + r];
  }
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < count; ++c) panel[(i + r) * STRIDE + c] = own[r][c];
  for (int64_t k = i + R; k < head.n; ++k) {
#pragma GCC unroll 4
    for (int lane = 0; lane < STRIDE; lane += W)
      store<T>(panel + k * STRIDE + lane, symmetric_weights<T>(head, k, i + lane));
  }
}

// Loss of a symmetric head, and what its W is made of; false where rows need shifts or pivots of their own.
template <class T>
bool symmetric_head(const SelfRelationLoss& op, const LossHead<T>& head, int64_t h) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const int64_t n = op.rows, batch = h / op.heads, number = h % op.heads;
  const auto pack = [&](const LossSide& side, T* diagonal) {
    const void* x = element(side.rows, batch, number);
    pack_rows<T, C>(head.b, x, side.rows, n, side.depth, op.normalize);
    for (int64_t i = 0; i < n; i += R)
      strip_of_panels<T>(head.b, n, side.depth, i, strip_at<T>(head.a, i, side.depth));
    diagonal_of<T, C>(head.b, n, side.depth, diagonal);
    return shift_of<T>(diagonal, n, static_cast<T>(side.scale * kLog2e));
  };
  Shifts<T> shifts;
  shifts.student_factor = static_cast<T>(op.student.scale * kLog2e);
  shifts.teacher_factor = static_cast<T>(op.teacher.scale * kLog2e);
  shifts.teacher_shift = pack(op.teacher, head.teacher);
  if (shifts.teacher_shift != shifts.teacher_shift) return false;
  // One panel of b stays in the first-level cache for all strips.
  const auto for_tiles = [&](auto&& work) {
    for (int64_t j = 0; j < n; j += C) {
      for (int64_t i = j / R * R; i < n; i += R) work(i, j, std::min({n, i + R, j + C}));
    }
  };
  for_tiles([&](int64_t i, int64_t from, int64_t to) {
    strip_product<T>(op.teacher.depth, strip_at<T>(head.a, i, op.teacher.depth), head.b, from, to,
                     head.row(i), head.stride);
  });
  shifts.student_shift = pack(op.student, head.student);
  if (shifts.student_shift != shifts.student_shift) return false;
  std::fill(head.sums, head.sums + 3 * n, Vec<T>{});
  for (T* sum : {head.e, head.f, head.apart}) std::fill(sum, sum + round_up(n, W), T(0));
  for (int64_t i = 0; i < n; i += W) {
    const Vec<T> own = exp2(load<T>(head.student + i) * shifts.student_factor - shifts.student_shift);
    store<T>(head.corner + i, own * kDominant<T>);
  }
  Vec<T> excess{};
  for_tiles([&](int64_t i, int64_t from, int64_t to) {
    strip_product<T>(op.student.depth, strip_at<T>(head.a, i, op.student.depth), head.b, from, to, head.strip,
                     head.width);
    excess = max<T>(excess, symmetric_strip<T>(head, shifts, i, from, to));
  });
  if (max_lanes<T>(excess) > 0) return false;
  const T weight = static_cast<T>(op.weight * op.student.scale), scale = static_cast<T>(op.student.scale);
  if (weight < std::numeric_limits<T>::min()) return false;  // dS over it would not be a number
  for (int64_t i = 0; i < n; ++i) {
    const T e = head.e[i] + sum_lanes<T>(head.sums[3 * i]),
            f = head.f[i] + sum_lanes<T>(head.sums[3 * i + 1]);
    const T apart = head.apart[i] + sum_lanes<T>(head.sums[3 * i + 2]);
    head.e[i] = e, head.f[i] = f, head.apart[i] = apart;
  }
  for (int64_t i = 0; i < n; i += W) {
    const Vec<T> own_e = exp2(load<T>(head.student + i) * shifts.student_factor - shifts.student_shift);
    const Vec<T> own_f = exp2(load<T>(head.teacher + i) * shifts.teacher_factor - shifts.teacher_shift);
    const Vec<T> e = load<T>(head.e + i), f = load<T>(head.f + i);
    const Vec<T> of_student = weight / (own_e + e), of_teacher = weight / (own_f + f);
    store<T>(head.of_student + i, of_student);
    store<T>(head.of_teacher + i, of_teacher);
    // As in RowPair::gradient: minus the sum of all others, or the plain difference.
    const Vec<T> own_p = own_e * of_student, own_q = own_f * of_teacher, p = e * of_student,
                 q = f * of_teacher;
    store<T>(head.corner + i, T(2) * (p + q < own_p + own_q ? q - p : own_p - own_q));
    store<T>(head.e + i, e / own_e);
    store<T>(head.f + i, f / own_f);
    store<T>(head.apart + i, scale * load<T>(head.apart + i) / (own_f + f));
  }
  for (int64_t i = 0; i < n; ++i) {
    const T sum = std::log1p(head.e[i]);
    keep_row<T>(op, h * n + i, sum + head.apart[i],
                {head.student[i], T(kLog2e) * sum, head.teacher[i], T(kLog2e) * std::log1p(head.f[i]),
                 static_cast<T>(i), head.corner[i] / (2 * weight)});
  }
  return true;
}

// Loss of any head, row by row; and dS or, where symmetric, W = dS + dSᵀ, if wanted.
template <class T>
void any_head(const SelfRelationLoss& op, const LossHead<T>& head, int64_t h, bool wants_gradient) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const int64_t n = op.rows, m = op.columns, batch = h / op.heads, number = h % op.heads;
  const auto pack = [&](const LossSide& side) {
    pack_rows<T, R>(head.a, element(side.rows, batch, number), side.rows, n, side.depth, op.normalize);
    pack_rows<T, C>(head.b, element(side.columns, batch, number), side.columns, m, side.depth, op.normalize);
  };
  pack(op.student);
  for (int64_t i = 0; i < n; i += R)
    strip_product<T>(op.student.depth, strip_at<T>(head.a, i, op.student.depth), head.b, 0, m, head.row(i),
                     head.stride);
  pack(op.teacher);
  const T student_factor = static_cast<T>(op.student.scale * kLog2e);
  const T teacher_factor = static_cast<T>(op.teacher.scale * kLog2e);
  const T weight = static_cast<T>(op.weight * op.student.scale);
  for (int64_t i = 0; i < n; i += R) {
    strip_product<T>(op.teacher.depth, strip_at<T>(head.a, i, op.teacher.depth), head.b, 0, m, head.strip,
                     head.width);
    for (int64_t r = 0; r < std::min<int64_t>(R, n - i); ++r) {
      T *s = head.row(i + r), *t = head.strip + r * head.width, *e = head.powers, *q = head.panel;
      const RowPair<T> row = row_pair<T>(s, t, e, q, m, student_factor, teacher_factor);
      keep_row<T>(op, h * n + i + r, row);
      if (wants_gradient) gradient_row<T>(row, e, q, s, m, weight);
    }
  }
  if (!wants_gradient || !op.symmetric) return;
  for (int64_t i = 0; i < n; i += W) {
    for (int64_t j = i; j < n; j += W) {
      Vec<T> upper[W], lower[W];
      for (int r = 0; r < W; ++r)
        upper[r] = load<T>(head.row(i + r) + j), lower[r] = load<T>(head.row(j + r) + i);
      transpose<T>(lower);
      for (int r = 0; r < W; ++r) {
        upper[r] += lower[r];
        store<T>(head.row(i + r) + j, upper[r]);
      }
      transpose<T>(upper);
      for (int r = 0; r < W; ++r) store<T>(head.row(j + r) + i, upper[r]);
    }
  }
}

// One gradient of a head: the square, or its columns, times `other`; or W, made of the two triangles, times
// it.
template <class T>
void multiply_head(const SelfRelationLoss& op, const LossHead<T>& head, int64_t h, bool of_triangles,
                   bool by_columns, const Strided& target, const Strided& other, const Strided& out) {
  constexpr int R = kTileRows;
  const int64_t rows = by_columns ? op.columns : op.rows, inner = by_columns ? op.rows : op.columns;
  const int64_t batch = h / op.heads, number = h % op.heads;
  GradientStrips<T> gradient(inner, op.student.depth, op.normalize);
  gradient.factor = head.b, gradient.product = head.strip;
  gradient.inverse = head.inverse, gradient.vectors = head.vectors;
  gradient.pack_factor(other, batch, number);
  for (int64_t i = 0; i < rows; i += R) {
    const int64_t count = std::min<int64_t>(R, rows - i);
    if (of_triangles) {
      panel_of_weights<T>(head, i, head.panel);
    } else if (by_columns || op.symmetric) {
      panel_of_columns<T>(head.square, head.stride, inner, i, head.panel);
    } else {
      pack<T, R>(head.panel, head.row(i), sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat, head.stride, 1,
                 count, inner);
    }
    gradient.write(head.panel, target, out, batch, number, i, count);
  }
}

// Heads [begin, end): loss, statistics and the wanted gradients of the loss times op.weight.
template <class T>
void loss_heads(const SelfRelationLoss& op, int64_t begin, int64_t end) {
  LossHead<T> head(op);
  size_t bytes = 0;
  head.lay_out(op, [&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  head.lay_out(op, [&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  const bool wants_gradient = op.wants_student || op.wants_columns;
  for (int64_t h = begin; h < end; ++h) {
    const bool of_triangles = op.symmetric && symmetric_head<T>(op, head, h);
    if (!of_triangles) any_head<T>(op, head, h, wants_gradient);
    if (op.wants_student) {
      multiply_head<T>(op, head, h, of_triangles, false, op.student.rows, op.student.columns,
                       op.grad_student);
    }
    if (op.wants_columns)
      multiply_head<T>(op, head, h, false, true, op.student.columns, op.student.rows, op.grad_columns);
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
