// The last product of a gradient by strips of rows, dX = D X, with D made by whoever calls: its right factor,
// packed once per head, and strips of the product on their way to memory. Included once per instruction set,
// after lengths.h.

namespace fastssl::cpu::FASTSSL_ISA {

// Rows [i, i + rows) of the gradient of `target`, at most a strip of them, to `out`. `strip` is changed;
// `vectors` has room for a strip of rows, which is not used without `normalize`.
template <class T>
void store_gradient(T* strip, int64_t width, int64_t rows, int64_t depth, bool normalize, T* vectors,
                    const Strided& target, const Strided& out, int64_t batch, int64_t head, int64_t i) {
  if (normalize)
    gradient_through_lengths<T>(element(target, batch, head, i), target, rows, depth, vectors, strip, width);
  store_strip<T>(strip, width, rows, depth, out, batch, head, i);
}

template <class T>
struct GradientStrips {
  static constexpr int R = kTileRows, C = kTileColumns<T>;
  int64_t inner, depth, width;  // rows and columns of X; its columns in whole panels
  int strips;                   // worked on together, so that a panel of X is read once for all of them
  bool normalize;               // D belongs to rows of length one
  T* factor = nullptr;          // X, packed
  T* product = nullptr;         // strips of the product
  T *inverse = nullptr, *vectors = nullptr;  // for lengths

  GradientStrips(int64_t inner, int64_t depth, bool normalize, int strips = 1)
      : inner(inner), depth(depth), width(round_up(depth, C)), strips(strips), normalize(normalize) {}

  template <class Take>
  void lay_out(Take&& take) {
    take(factor, inner * width);
    take(product, strips * R * width);
    take(inverse, normalize ? round_up(inner, C) : 0);
    take(vectors, normalize ? depth * std::max(C, kStripStride<T>) : 0);
  }
  void pack_factor(const Strided& x, int64_t batch, int64_t head) const {
    pack_depth<T, C>(factor, element(x, batch, head), x, inner, depth, normalize, inverse, vectors);
  }
  // Product of `panels`, which hold count rows of D as strips; count is at most strips · R.
  void multiply(const T* panels, int64_t count) const {
    for (int64_t c = 0; c < depth; c += C) {
      for (int64_t r = 0; r < count; r += R)
        strip_product<T>(inner, strip_at<T>(panels, r, inner), factor, c, std::min(c + C, depth),
                         product + r * width, width);
    }
  }
  // The product as rows [i, i + count) of the gradient of `target` to `out`.
  void store(const Strided& target, const Strided& out, int64_t batch, int64_t head, int64_t i,
             int64_t count) const {
    for (int64_t r = 0; r < count; r += R)
      store_gradient<T>(product + r * width, width, std::min<int64_t>(R, count - r), depth, normalize,
                        vectors, target, out, batch, head, i + r);
  }
  void write(const T* panels, const Strided& target, const Strided& out, int64_t batch, int64_t head,
             int64_t i, int64_t count) const {
    multiply(panels, count);
    store(target, out, batch, head, i, count);
  }
};

}  // namespace fastssl::cpu::FASTSSL_ISA
