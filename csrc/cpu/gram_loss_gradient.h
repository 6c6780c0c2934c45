// gram_loss on the CPU, its gradient for any size: dX = 4 w D X, with D, the mask's share of S − T, made by
// pairs of bands of kGramBand rows and thrown away. Included by gram_loss.h, once per instruction set.
//
// D is symmetric: its block D_ab of bands a and b is made once, and goes to both of them,
//   dX_a += D_ab X_b,   dX_b += D_abᵀ X_a.
// So that no two threads add to one band, the pairs are played in the rounds of a tournament, in each of
// which a band has one partner. A band meets its partners in an order that the shape alone decides, so that
// how a round is split over threads changes no bit; and one gradient of X's size is all that threads share
// beside packed tokens.

namespace fastssl::cpu::FASTSSL_ISA {

// One band: its packed tokens and its gradient, the latter not yet through the lengths.
template <class T>
struct GramBand {
  static constexpr int R = kTileRows, C = kTileColumns<T>;
  static_assert(kGramBand % C == 0);
  int64_t image, begin, rows, width;
  T *student, *teacher;  // as columns
  T* factor;             // the student's as the right factor of the gradient
  T* gradient;

  static int64_t bytes(const GramLoss& op) {
    const int64_t width = round_up(op.student_depth, C);
    return (kGramBand * (op.student_depth + op.teacher_depth + width) + round_up(kGramBand, R) * width) *
           static_cast<int64_t>(sizeof(T));
  }
  GramBand(const GramLoss& op, int64_t item, int64_t band)
      : image(op.first + item),
        begin(band * kGramBand),
        rows(std::min(kGramBand, op.rows - begin)),
        width(round_up(op.student_depth, C)),
        student(reinterpret_cast<T*>(op.bands + (item * op.bands_per_image() + band) * bytes(op))),
        teacher(student + kGramBand * op.student_depth),
        factor(teacher + kGramBand * op.teacher_depth),
        gradient(factor + kGramBand * width) {}
};

// What one thread needs for a pair of bands.
template <class T>
struct GramPair {
  static constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  // Rows of D are an odd number of vectors apart, or columns would share few places of the cache. There is
  // room for the last strip of its columns.
  static constexpr int64_t kStride = ((kGramBand + kStripStride<T>) / W | 1) * W;
  T *student = nullptr, *teacher = nullptr;  // strips of the first band's rows
  T *s = nullptr, *t = nullptr;              // tiles
  T* block = nullptr;                        // D of the pair
  T *rows = nullptr, *columns = nullptr;     // its rows and its columns as left factors

  template <class Take>
  void lay_out(const GramLoss& op, Take&& take) {
    take(student, strips_size<T>(kGramBand, op.student_depth));
    take(teacher, strips_size<T>(kGramBand, op.teacher_depth));
    take(s, R * C);
    take(t, R * C);
    take(block, kGramBand * kStride);
    take(rows, strips_size<T>(kGramBand, kGramBand));
    take(columns, strips_size<T>(kGramBand, kGramBand));
  }
};

// The gradient of band `to` gets what `panels`, strips of its rows of D, have to say of band `from`: at first
// nothing else, later beside what is there. A panel of the factor is read once for all strips.
template <class T, bool ADD>
void add_product(const GramLoss& op, const T* panels, const GramBand<T>& from, const GramBand<T>& to) {
  constexpr int R = kTileRows, C = kTileColumns<T>;
  for (int64_t c = 0; c < op.student_depth; c += C)
    for (int64_t r = 0; r < to.rows; r += R)
      strip_product<T, ADD>(from.rows, strip_at<T>(panels, r, from.rows), from.factor, c,
                            std::min(c + C, op.student_depth), to.gradient + r * to.width, to.width);
}

// What two bands, or one and itself, give each other.
template <class T, int REMOVE, bool SAME>
void pair_of_bands(const GramLoss& op, const GramPair<T>& work, const GramBand<T>& a, const GramBand<T>& b) {
  constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  constexpr int64_t kStride = GramPair<T>::kStride;
  const T scale = static_cast<T>(4 * op.weight);
  for (int64_t i = 0; i < a.rows; i += R) {
    strip_of_panels<T>(a.student, a.rows, op.student_depth, i,
                       strip_at<T>(work.student, i, op.student_depth));
    strip_of_panels<T>(a.teacher, a.rows, op.teacher_depth, i,
                       strip_at<T>(work.teacher, i, op.teacher_depth));
  }
  for (int64_t j = 0; j < b.rows; j += C) {
    const bool narrow = b.rows - j <= W;
    const int columns = narrow ? W : C;
    for (int64_t i = 0; i < a.rows; i += R) {
      const auto product = [&](const T* strips, const T* panels, int64_t depth, T* to) {
        const T *left = strip_at<T>(strips, i, depth), *right = panels + j * depth;
        narrow ? tile<T, 1>(depth, left, right, C, to, C) : tile<T, 2>(depth, left, right, C, to, C);
      };
      product(work.student, b.student, op.student_depth, work.s);
      product(work.teacher, b.teacher, op.teacher_depth, work.t);
      const int count = static_cast<int>(std::min<int64_t>(R, a.rows - i));
      for (int r = 0; r < count; ++r) {
        for (int v = 0; v < columns; v += W) {
          T* at = work.s + r * C + v;
          const Vec<T> s = load<T>(at), d = difference<T, REMOVE>(s, load<T>(work.t + r * C + v));
          const Vec<T> g = half_gradient<T, REMOVE>(s, d) * scale;
          store<T>(at, g);
          if (!SAME) store<T>(work.block + (i + r) * kStride + j + v, g);
        }
      }
      pack<T, R>(strip_at<T>(work.rows, i, b.rows) + j * kStripStride<T>, work.s,
                 sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat, C, 1, count,
                 std::min<int64_t>(columns, b.rows - j));
    }
  }
  add_product<T, !SAME>(op, work.rows, b, a);
  if (SAME) return;
  for (int64_t j = 0; j < b.rows; j += R)
    panel_of_columns<T>(work.block, kStride, a.rows, j, strip_at<T>(work.columns, j, a.rows));
  add_product<T, true>(op, work.columns, a, b);
}

// Bands [begin, end) of all images at hand: packed, and what each gives itself.
template <class T, int REMOVE>
void gram_gradient_bands(const GramLoss& op, int64_t begin, int64_t end) {
  constexpr int C = kTileColumns<T>;
  const int64_t bands = op.bands_per_image();
  GramPair<T> work;
  T *inverse = nullptr, *vectors = nullptr;
  const auto lay_out = [&](auto&& take) {
    work.lay_out(op, take);
    take(inverse, op.normalize ? kGramBand : 0);
    take(vectors, op.normalize ? op.student_depth * C : 0);
  };
  size_t bytes = 0;
  lay_out([&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  lay_out([&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  for (int64_t item = begin; item < end; ++item) {
    const GramBand<T> band(op, item / bands, item % bands);
    const void *student = element(op.student, band.image, 0, band.begin),
               *teacher = element(op.teacher, band.image, 0, band.begin);
    pack_rows<T, C>(band.student, student, op.student, band.rows, op.student_depth, op.normalize);
    pack_rows<T, C>(band.teacher, teacher, op.teacher, band.rows, op.teacher_depth, op.normalize);
    pack_depth<T, C>(band.factor, student, op.student, band.rows, op.student_depth, op.normalize, inverse,
                     vectors);
    pair_of_bands<T, REMOVE, true>(op, work, band, band);
  }
}

// Pairs [begin, end) of one round, of all images at hand. The bands sit in a circle that turns by one each
// round, and face each other across it: i and k with i + k = 2 · round, modulo the circle. Who faces nobody
// rests, or meets the one in the middle, the last of an even number of bands.
template <class T, int REMOVE>
void gram_gradient_pairs(const GramLoss& op, int64_t round, int64_t begin, int64_t end) {
  const int64_t bands = op.bands_per_image(), pairs = bands / 2, circle = bands - 1 + bands % 2;
  GramPair<T> work;
  size_t bytes = 0;
  work.lay_out(op, [&](T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  Scratch scratch(bytes);
  work.lay_out(op, [&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / pairs, apart = item % pairs + bands % 2;
    const int64_t one = (round + apart) % circle,
                  other = apart == 0 ? bands - 1 : (round - apart + circle) % circle;
    pair_of_bands<T, REMOVE, false>(op, work, GramBand<T>(op, image, one), GramBand<T>(op, image, other));
  }
}

// Bands [begin, end) of all images at hand: their gradients through the lengths, to memory.
template <class T>
void gram_gradient_store(const GramLoss& op, int64_t begin, int64_t end) {
  constexpr int64_t R = kTileRows;
  const int64_t bands = op.bands_per_image(), size = op.normalize ? op.student_depth * kStripStride<T> : 0;
  Scratch scratch(Scratch::bytes_of<T>(size));
  T* vectors = scratch.take<T>(size);
  for (int64_t item = begin; item < end; ++item) {
    const GramBand<T> band(op, item / bands, item % bands);
    for (int64_t r = 0; r < band.rows; r += R)
      store_gradient<T>(band.gradient + r * band.width, band.width, std::min(R, band.rows - r),
                        op.student_depth, op.normalize, vectors, op.student, op.grad_student, band.image, 0,
                        band.begin + r);
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
