// Attention within one (sequence, head) on the CPU, forward and backward. Included once per instruction set
// by foreach_isa.h.
//
// Queries are lanes: the logits of a block of queries stand as logits[key][query], so that maxima,
// exponentials and sums over the keys are plain arithmetic on vectors, and so that the same matrix is the
// left factor of every product that follows, read either way round in place: out = Pᵀ V and dQ = dSᵀ K over
// the keys, dV = P dO and dK = dS Q over the queries. Tokens are copied to rows of T first, from wherever
// they lie: a few tens of kilobytes that stay in the second-level cache. With queries scaled by scale ·
// log2(e), P = 2^(logits − maximum) / sum; backward shifts by the saved log-sum-exp in place of the maximum.

namespace fastssl::cpu::FASTSSL_ISA {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Queries of a block, and the distance of the matrix's rows: an odd number of cache lines. For short
// sequences a smaller one, that the first-level cache may hold.
constexpr int64_t kLongBlock = 256, kShortBlock = 64;
constexpr int64_t row_distance(int64_t block) { return block + 16; }
// float64 exists for exactness: it has one block.
template <class T>
constexpr int64_t block_for(int64_t count) {
  return sizeof(T) == 8 || count > kShortBlock ? kLongBlock : kShortBlock;
}

template <class T, class S>
void copy_row(const S* from, int64_t stride, int64_t depth, T factor, T* to, int64_t padded) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t c = 0; c < padded; c += W) {
    const int64_t lanes = std::min<int64_t>(W, depth - c);
    const Vec<T> v = stride != 1  ? load_strided<T>(from + c * stride, stride, lanes)
                     : lanes == W ? load_any<T>(from + c)
                                  : load_part<T>(from + c, lanes, T{0});
    store<T>(to + c, v * factor);
  }
}
template <class T, class S>
void write_row(const T* from, int64_t depth, T factor, S* to, int64_t stride, bool streams) {
  constexpr int W = Simd<T>::kWidth;
  if constexpr (std::is_same_v<T, S>) {
    if (streams && stride == 1 && depth % W == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(Vec<T>) == 0) {
      for (int64_t c = 0; c < depth; c += W) stream<T>(to + c, load<T>(from + c) * factor);
      return;
    }
  }
  for (int64_t c = 0; c < depth; c += W) {
    const Vec<T> v = load<T>(from + c) * factor;
    const int64_t lanes = std::min<int64_t>(W, depth - c);
    if (stride == 1 && lanes == W) {
      store_any<T>(to + c, v);
    } else {
      S one[W];
      store_any<T>(one, v);
      for (int64_t l = 0; l < lanes; ++l) to[(c + l) * stride] = one[l];
    }
  }
}
// f(S{}) for the element type S of a tensor that is computed in T.
template <class T, class F>
FASTSSL_INLINE void with_type(Dtype dtype, F&& f) {
  if constexpr (sizeof(T) == 8) {
    f(double{});
  } else {
    if (dtype == Dtype::kFloat) f(float{});
    if (dtype == Dtype::kBFloat16) f(BFloat16Bits{});
    if (dtype == Dtype::kHalf) f(HalfBits{});
  }
}

// One (sequence, head) of a call, and its scratch memory.
template <class T>
struct Head {
  static constexpr int W = Simd<T>::kWidth, R = kTileRows, C = kTileColumns<T>;
  const Attention& op;
  int64_t longest, padded;                                      // tokens; width of a row of T
  T *q = nullptr, *k = nullptr, *v = nullptr, *grad = nullptr;  // (tokens, padded)
  T *key_strips = nullptr, *value_strips = nullptr;
  T *logits = nullptr, *slopes = nullptr;  // (keys, queries of a block)
  T *panel = nullptr, *rows = nullptr;     // C queries, R rows of a result
  T *grad_k = nullptr, *grad_v = nullptr;  // (tokens, padded)
  T* total = nullptr;                      // of a block's queries: Σ 2^(logits − maximum)
  Sequence sequence{}, next{};
  int64_t head = 0, next_head = 0, asked = 0, at_once = 0;

  Head(const Attention& op, int64_t longest)
      : op(op), longest(longest), padded(round_up(op.depth, Simd<T>::kWidth)) {}

  template <class Take>
  void lay_out(bool backward, Take&& take) {
    const int64_t whole = round_up(longest, R);
    const int64_t matrix = whole * row_distance(block_for<T>(longest));
    for (T** rows : {&q, &k, &v}) take(*rows, longest * padded);
    take(key_strips, strips_size<T>(longest, op.depth));
    take(logits, matrix);
    take(panel, op.depth * C);
    take(rows, R * padded);
    take(total, kLongBlock + C);
    if (!backward) return;
    take(grad, longest * padded);
    take(value_strips, strips_size<T>(longest, op.depth));
    take(slopes, matrix);
    for (T** rows : {&grad_k, &grad_v}) take(*rows, whole * padded);
  }
  size_t bytes(bool backward) {
    size_t sum = 0;
    lay_out(backward, [&](T*&, int64_t count) { sum += Scratch::bytes_of<T>(count); });
    return sum;
  }
  void place(bool backward, Scratch& scratch) {
    lay_out(backward, [&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  }

  int64_t token(const Sequence& of, int64_t i) const {
    return op.index.empty() ? of.begin + i : op.index[of.begin + i];
  }
  int64_t token(int64_t i) const { return token(sequence, i); }

  // The item to come is asked for from memory while this one is computed: its rows lie a whole token apart,
  // which no processor foresees. `products` asks for a few after each of its `tiles`.
  void foresee(int64_t item) {
    const int64_t n = sequence.count, tiles = ceil_div(n, C) * ceil_div(n, R);
    next = op.sequences[item / op.heads];
    next_head = item % op.heads;
    asked = 0;
    at_once = ceil_div(next.count, tiles);
  }
  void ask() {
    const int64_t end = std::min(asked + at_once, next.count);
    for (; asked < end; ++asked) {
      for (const Strided* t : {&op.q, &op.k, &op.v, &op.grad}) {
        if (t->data == nullptr) continue;
        const char* row = static_cast<const char*>(element(*t, next.image, next_head, token(next, asked)));
        for (int64_t line = 0; line < op.depth * element_size(t->dtype); line += 64)
          __builtin_prefetch(row + line, 0, 2);
      }
    }
  }

  void gather(const Strided& from, T factor, T* to) const {
    with_type<T>(from.dtype, [&](auto type) {
      using S = decltype(type);
      for (int64_t i = 0; i < sequence.count; ++i)
        copy_row<T>(static_cast<const S*>(element(from, sequence.image, head, token(i))), from.column_stride,
                    op.depth, factor, to + i * padded, padded);
    });
  }
  void scatter(const T* from, int64_t first, int64_t count, T factor, const Strided& to) const {
    with_type<T>(to.dtype, [&](auto type) {
      using S = decltype(type);
      for (int64_t i = 0; i < count; ++i)
        write_row<T>(from + i * padded, op.depth, factor,
                     static_cast<S*>(element(to, sequence.image, head, token(first + i))), to.column_stride,
                     op.streams);
    });
  }
  void pack_strips(const T* tokens, T* strips) const {
    pack<T, R>(strips, tokens, sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat, padded, 1, sequence.count,
               op.depth);
  }

  // matrix[key][query] = token of strips · token of `others`, for queries [i, i + C).
  template <int64_t LD>
  void products(const T* strips, const T* others, int64_t i, T* matrix) {
    const int64_t n = sequence.count, count = std::min<int64_t>(C, n - i);
    pack<T, C>(panel, others + i * padded, sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat, padded, 1, count,
               op.depth);
    const int64_t vectors = ceil_div(count, W);
    for (int64_t j = 0; j < n; j += R) {
      last_tile<T, 1, kStripStride<T>, false>(n - j, vectors, op.depth, strip_at<T>(strips, j, op.depth),
                                              panel, C, matrix + j * LD, LD);
      ask();
    }
  }
  // The maxima of one vector of queries.
  template <int64_t LD>
  FASTSSL_INLINE Vec<T> peaks(const T* column) const {
    Vec<T> peak = load<T>(column);
    for (int64_t j = 1; j < sequence.count; ++j) peak = max<T>(peak, load<T>(column + j * LD));
    return peak;
  }
  // Logits of one vector of queries become 2^(logits − maximum); returns the maximum, leaves the sum.
  template <int64_t LD>
  FASTSSL_INLINE Vec<T> exponentials(T* column, Vec<T>& sum) const {
    const int64_t n = sequence.count;
    const Vec<T> peak = peaks<LD>(column);
    Vec<T> sums[2] = {};
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> p = exp2(load<T>(column + j * LD) - peak);
      store<T>(column + j * LD, p);
      sums[j & 1] += p;
    }
    sum = sums[0] + sums[1];
    return peak;
  }

  // The saved log-sum-exp of the queries from i on, in powers of two.
  FASTSSL_INLINE Vec<T> lse_of(int64_t i) const {
    Vec<T> lse{};
    const int64_t lanes = std::min<int64_t>(W, sequence.count - i);
    for (int64_t l = 0; l < lanes; ++l)
      lse[l] = *static_cast<const T*>(element(op.lse, sequence.image, head, token(i + l)));
    return lse * static_cast<T>(kLog2E);
  }
  // One vector of queries: logits become P, slopes (dO Vᵀ) become dS = P (slopes − Σ P slopes). Any shift
  // near the maximum will do, as P is divided by its sum; the rounding of a large lse may be too far from it.
  template <int64_t LD>
  FASTSSL_INLINE void slopes_of_logits(T* column, T* slope, Vec<T> lse) const {
    const int64_t n = sequence.count;
    bool near = true;
    for (int lane = 0; lane < W; ++lane) near &= std::abs(lse[lane]) < T{1 << 20};
    if (!near) lse = peaks<LD>(column);
    Vec<T> sums[2] = {}, products[2] = {};
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> p = exp2(load<T>(column + j * LD) - lse);
      store<T>(column + j * LD, p);
      sums[j & 1] += p;
      products[j & 1] += p * load<T>(slope + j * LD);
    }
    const Vec<T> inverse = T{1} / (sums[0] + sums[1]), delta = (products[0] + products[1]) * inverse;
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> p = load<T>(column + j * LD) * inverse;
      store<T>(column + j * LD, p);
      store<T>(slope + j * LD, p * (load<T>(slope + j * LD) - delta));
    }
  }

  // `rows` of the first `queries` queries, at most R: Σ_key matrix[key][query] tokens[key].
  template <int64_t LD>
  void over_keys(const T* matrix, const T* tokens, int64_t queries) const {
    for (int64_t c = 0; c < padded; c += C)
      last_tile<T, 1, LD, false>(queries, (padded - c) / W, sequence.count, matrix, tokens + c, padded,
                                 rows + c, padded);
  }
  // to[key] += Σ_query matrix[key][query] tokens[query] over `queries` queries.
  template <int64_t LD>
  void over_queries(const T* matrix, const T* tokens, int64_t queries, T* to) const {
    for (int64_t j = 0; j < sequence.count; j += R)
      for (int64_t c = 0; c < padded; c += C)
        last_tile<T, LD, 1, true>(sequence.count - j, (padded - c) / W, queries, matrix + j * LD, tokens + c,
                                  padded, to + j * padded + c, padded);
  }

  template <int64_t BLOCK>
  void forward() {
    constexpr int64_t LD = row_distance(BLOCK);
    const int64_t n = sequence.count;
    gather(op.q, static_cast<T>(op.scale * kLog2E), q);
    gather(op.k, T{1}, k);
    gather(op.v, T{1}, v);
    pack_strips(k, key_strips);
    for (int64_t first = 0; first < n; first += BLOCK) {
      const int64_t queries = std::min(BLOCK, n - first);
      for (int64_t i = 0; i < queries; i += C) {
        products<LD>(key_strips, q, first + i, logits + i);
        for (int64_t l = i; l < i + C && l < queries; l += W) {
          Vec<T> sum;
          const Vec<T> peak = exponentials<LD>(logits + l, sum);
          store<T>(total + l, sum);
          const Vec<T> lse = (peak + log2(sum)) * static_cast<T>(kLn2);
          const int64_t lanes = std::min<int64_t>(W, queries - l);
          for (int64_t lane = 0; lane < lanes; ++lane)
            *static_cast<T*>(element(op.lse, sequence.image, head, token(first + l + lane))) = lse[lane];
        }
      }
      for (int64_t i = 0; i < queries; i += R) {
        const int64_t count = std::min<int64_t>(R, queries - i);
        over_keys<LD>(logits + i, v, count);
        for (int64_t r = 0; r < count; ++r)
          scatter(rows + r * padded, first + i + r, 1, T{1} / total[i + r], op.out);
      }
    }
  }

  template <int64_t BLOCK>
  void backward() {
    constexpr int64_t LD = row_distance(BLOCK);
    const int64_t n = sequence.count, whole = round_up(n, R);
    gather(op.q, static_cast<T>(op.scale * kLog2E), q);
    gather(op.k, T{1}, k);
    gather(op.v, T{1}, v);
    gather(op.grad, T{1}, grad);
    pack_strips(k, key_strips);
    pack_strips(v, value_strips);
    std::fill_n(grad_k, whole * padded, T{0});
    std::fill_n(grad_v, whole * padded, T{0});
    for (int64_t first = 0; first < n; first += BLOCK) {
      const int64_t queries = std::min(BLOCK, n - first);
      for (int64_t i = 0; i < queries; i += C) {
        products<LD>(key_strips, q, first + i, logits + i);
        products<LD>(value_strips, grad, first + i, slopes + i);
        for (int64_t l = i; l < i + C && l < queries; l += W)
          slopes_of_logits<LD>(logits + l, slopes + l, lse_of(first + l));
      }
      over_queries<LD>(logits, grad + first * padded, queries, grad_v);
      over_queries<LD>(slopes, q + first * padded, queries, grad_k);
      for (int64_t i = 0; i < queries; i += R) {
        const int64_t count = std::min<int64_t>(R, queries - i);
        over_keys<LD>(slopes + i, k, count);
        scatter(rows, first + i, count, static_cast<T>(op.scale), op.grad_q);
      }
    }
    scatter(grad_k, 0, n, static_cast<T>(kLn2), op.grad_k);
    scatter(grad_v, 0, n, T{1}, op.grad_v);
  }
};

// The given items: sequence · heads + head.
template <class T>
void attention_items(const Attention& op, bool backward, const int64_t* items, int64_t count) {
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = std::max(longest, op.sequences[items[i] / op.heads].count);
  Head<T> head(op, longest);
  Scratch scratch(head.bytes(backward));
  head.place(backward, scratch);
  for (int64_t i = 0; i < count; ++i) {
    head.sequence = op.sequences[items[i] / op.heads];
    head.head = items[i] % op.heads;
    if (i + 1 < count) head.foresee(items[i + 1]);
    const int64_t block = block_for<T>(head.sequence.count);
    if constexpr (sizeof(T) == 4) {
      if (block == kShortBlock) {
        backward ? head.template backward<kShortBlock>() : head.template forward<kShortBlock>();
        continue;
      }
    }
    backward ? head.template backward<kLongBlock>() : head.template forward<kLongBlock>();
  }
  stream_end();
}

}  // namespace fastssl::cpu::FASTSSL_ISA
