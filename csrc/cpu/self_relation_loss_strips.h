// self_relation_loss on the CPU for any size: strips of rows, each with all of its columns and no matrix
// beside them; the gradient computes the strips again. Included by self_relation_loss.h, once per instruction
// set.
//
// The gradient of a strip of rows, and where symmetric of the same strip of columns:
//   dX_i = s_s Σ_j dS_ij Xc_j (+ s_s Σ_j dS_ji X_j),   dXc_j = s_s Σ_i dS_ij X_i.
// A row's own terms come from the row itself; those of other rows from what the forward kept of them,
//   P_ji = 2^((S_ji − top_j)·f − log2 Σ_k 2^((S_jk − top_j)·f)), dS at the pivot as it is.

namespace fastssl::cpu::FASTSSL_ISA {

// Packed columns of student and teacher, and a strip of each.
template <class T>
struct LossStrips {
  static constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  int64_t columns, width;
  T *student = nullptr, *teacher = nullptr;  // packed columns
  T* rows = nullptr;                         // a strip of packed rows of either
  T *s = nullptr, *t = nullptr;              // strips of products
  T *e = nullptr, *q = nullptr;              // a strip of powers, then of dS; a row of powers

  explicit LossStrips(int64_t columns) : columns(columns), width(round_up(columns, C)) {}

  template <class Take>
  void lay_out(const SelfRelationLoss& op, Take&& take) {
    take(student, width * op.student.depth);
    take(teacher, width * op.teacher.depth);
    take(rows, kStripStride<T> * std::max(op.student.depth, op.teacher.depth));
    take(s, R * width);
    take(t, R * width);
    take(e, R * width);
    take(q, width);
  }
  void pack_columns(const SelfRelationLoss& op, bool swapped, int64_t h) const {
    const auto pack = [&](const LossSide& side, T* to) {
      const Strided& m = swapped ? side.rows : side.columns;
      pack_rows<T, C>(to, element(m, h / op.heads, h % op.heads), m, columns, side.depth, op.normalize);
    };
    pack(op.student, student);
    pack(op.teacher, teacher);
  }
  // s and t of rows [i, i + count), of the columns where `swapped`.
  void multiply(const SelfRelationLoss& op, bool swapped, int64_t h, int64_t i, int64_t count) const {
    const auto product = [&](const LossSide& side, const T* packed, T* to) {
      const Strided& m = swapped ? side.columns : side.rows;
      pack_rows<T, R>(rows, element(m, h / op.heads, h % op.heads, i), m, count, side.depth, op.normalize);
      strip_product<T>(side.depth, rows, packed, 0, columns, to, width);
    };
    product(op.student, student, s);
    product(op.teacher, teacher, t);
  }
};

// Strips [begin, end) of all heads in a row: loss and statistics.
template <class T>
void loss_strips(const SelfRelationLoss& op, int64_t begin, int64_t end) {
  constexpr int R = kTileRows;
  const int64_t n = op.rows, strips = ceil_div(n, R);
  const T student_factor = static_cast<T>(op.student.scale * kLog2e);
  const T teacher_factor = static_cast<T>(op.teacher.scale * kLog2e);
  LossStrips<T> work(op.columns);
  size_t bytes = 0;
  work.lay_out(op, [&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  work.lay_out(op, [&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item / strips, i = item % strips * R, count = std::min<int64_t>(R, n - i);
    if (h != packed) work.pack_columns(op, false, h);
    packed = h;
    work.multiply(op, false, h, i, count);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = r * work.width;
      const RowPair<T> row =
          row_pair<T>(work.s + at, work.t + at, work.e, work.q, op.columns, student_factor, teacher_factor);
      keep_row<T>(op, h * n + i + r, row);
    }
  }
}

// What the forward kept of the rows of one head, and their weights, in memory of whole vectors.
template <class T>
struct KeptRows {
  T *numbers[kKeptNumbers] = {}, *weight = nullptr;
  T student_factor, teacher_factor;

  template <class Take>
  void lay_out(const SelfRelationLoss& op, Take&& take) {
    const int64_t size = round_up(op.rows, Simd<T>::kWidth);
    for (T*& pointer : numbers) take(pointer, size);
    take(weight, size);
  }
  void read(const SelfRelationLoss& op, int64_t h) const {
    const int64_t n = op.rows, all = op.batch * op.heads * n;
    const T* stats = static_cast<const T*>(op.stats) + h * n;
    for (int i = 0; i < kKeptNumbers; ++i) {
      std::copy(stats + i * all, stats + i * all + n, numbers[i]);
      std::fill(numbers[i] + n, numbers[i] + round_up(n, Simd<T>::kWidth), T(0));
    }
    const Strided& m = op.weights;
    const T* from = static_cast<const T*>(element(m, h / op.heads, h % op.heads));
    for (int64_t i = 0; i < n; ++i) weight[i] = from[i * m.row_stride] * static_cast<T>(op.student.scale);
    std::fill(weight + n, weight + round_up(n, Simd<T>::kWidth), T(0));
  }
  // dS of rows j … j + W in column `column`, given their products with it.
  FASTSSL_INLINE Vec<T> gradient(Vec<T> s, Vec<T> t, int64_t j, int64_t column) const {
    const T s_sign = student_factor < 0 ? T(-1) : T(1), t_sign = teacher_factor < 0 ? T(-1) : T(1);
    const auto at = [&](int i) { return load<T>(numbers[i] + j); };
    const Vec<T> p = exp2((s * s_sign - at(0)) * (student_factor * s_sign) - at(1));
    const Vec<T> q = exp2((t * t_sign - at(2)) * (teacher_factor * t_sign) - at(3));
    return load<T>(weight + j) * (at(4) == broadcast<T>(static_cast<T>(column)) ? at(5) : p - q);
  }
};

// Strips [begin, end) of all heads in a row, of the gradient of the student's rows or of its columns.
template <class T>
void loss_gradient_strips(const SelfRelationLoss& op, bool of_columns, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows;
  const Strided& target = of_columns ? op.student.columns : op.student.rows;
  const Strided& other = of_columns ? op.student.rows : op.student.columns;
  const Strided& out = of_columns ? op.grad_columns : op.grad_student;
  const int64_t rows = of_columns ? op.columns : op.rows, inner = of_columns ? op.rows : op.columns;
  const int64_t strips = ceil_div(rows, R);
  LossStrips<T> work(inner);
  GradientStrips<T> gradient(inner, op.student.depth, op.normalize);
  KeptRows<T> kept;
  kept.student_factor = static_cast<T>(op.student.scale * kLog2e);
  kept.teacher_factor = static_cast<T>(op.teacher.scale * kLog2e);
  T* panel = nullptr;
  const auto lay_out = [&](auto&& take) {
    work.lay_out(op, take);
    kept.lay_out(op, take);
    gradient.lay_out(take);
    take(panel, kStripStride<T> * inner);
  };
  size_t bytes = 0;
  lay_out([&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  lay_out([&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item / strips, i = item % strips * R, count = std::min<int64_t>(R, rows - i);
    const int64_t batch = h / op.heads, number = h % op.heads;
    if (h != packed) {
      work.pack_columns(op, of_columns, h);
      kept.read(op, h);
      gradient.pack_factor(other, batch, number);
      packed = h;
    }
    work.multiply(op, of_columns, h, i, count);
    for (int64_t r = 0; r < count; ++r) {
      const T *s = work.s + r * work.width, *t = work.t + r * work.width;
      T* ds = work.e + r * work.width;
      if (of_columns) {
        for (int64_t j = 0; j < inner; j += W)
          store<T>(ds + j, kept.gradient(load<T>(s + j), load<T>(t + j), j, i + r));
        continue;
      }
      const RowPair<T> row = row_pair<T>(s, t, ds, work.q, inner, kept.student_factor, kept.teacher_factor);
      gradient_row<T>(row, ds, work.q, ds, inner, kept.weight[i + r]);
      if (op.symmetric) {
        for (int64_t j = 0; j < inner; j += W)
          store<T>(ds + j, load<T>(ds + j) + kept.gradient(load<T>(s + j), load<T>(t + j), j, i + r));
      }
    }
    pack<T, R>(panel, work.e, sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat, work.width, 1, count, inner);
    gradient.write(panel, target, out, batch, number, i, count);
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
