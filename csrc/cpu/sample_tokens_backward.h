// sample_tokens' backward on the CPU. Included by sample_tokens.h, once per instruction set.
//
// The gradient of a token is Σ weight · grad_p over the cells that it is a corner of. They are sorted by
// token first (a counting sort, which keeps the order of the points), so that each gradient is summed in
// registers and written once; scattering would read and write four rows per point. The gradient of a
// coordinate is size/2 · Σ_c grad_pc · slope_pc, with
//   slope_x = (ne − nw)(1 − fy) + (se − sw) fy,  slope_y = (sw − nw)(1 − fx) + (se − ne) fx.

namespace fastssl::cpu::FASTSSL_ISA {

// Upstream gradients, the rows of points: as they lie if their channels do side by side, else packed.
inline bool packs_grad(const SampleTokens& op) { return !is_unit(op.grad.element_stride, op.channels); }
// Gradients of a map are stored as they come if its channels lie side by side, else through a packed map.
inline bool packs_grad_x(const SampleTokens& op) {
  return op.grad_x.data != nullptr && !is_unit(op.grad_x.channel_stride, op.channels);
}

template <class S>
int64_t sample_backward_block(const SampleTokens& op) {
  const bool packs = is_packed(op) || packs_grad(op) || packs_grad_x(op);
  return packs ? Simd<Sum<S>>::kWidth : balanced_block<Sum<S>>(op.channels);
}
template <class S>
int64_t sample_backward_blocks(const SampleTokens& op) {
  return ceil_div(op.channels, sample_backward_block<S>(op));
}

// The corners of cells, sorted by token: those of token t are entries[starts[t]] … entries[starts[t + 1]].
template <class T>
struct Corners {
  struct Entry {
    int64_t point;
    T weight;
  };
  int64_t* starts;  // height · width + 1
  Entry* entries;   // 4 · points

  void sort(const SampleTokens& op, const Cell<T>* cells) {
    const int64_t tokens = op.height * op.width;
    std::fill(starts, starts + tokens + 1, 0);
    for (int64_t p = 0; p < op.points; ++p) {
      for (int k = 0; k < 4; ++k) {
        const int64_t token = token_of(op, cells[p], k);
        if (token >= 0) ++starts[token + 1];
      }
    }
    for (int64_t t = 0; t < tokens; ++t) starts[t + 1] += starts[t];
    // While it is filled, starts[t] is where token t goes on; in the end that is where token t + 1 starts.
    for (int64_t p = 0; p < op.points; ++p) {
      for (int k = 0; k < 4; ++k) {
        const int64_t token = token_of(op, cells[p], k);
        if (token >= 0) entries[starts[token]++] = {p, cells[p].weight[k]};
      }
    }
    std::copy_backward(starts, starts + tokens, starts + tokens + 1);
    starts[0] = 0;
  }

  // Corner k of a cell, or -1 where it is outside the map.
  static int64_t token_of(const SampleTokens& op, const Cell<T>& cell, int k) {
    const int64_t y = cell.y + k / 2, x = cell.x + k % 2;
    return y >= 0 && y < op.height && x >= 0 && x < op.width ? y * op.width + x : -1;
  }
};

// Rows of upstream gradients.
template <class E>
struct Grads {
  const E* data;
  int64_t stride;
};

// Up to this many products are summed in one chain: a longer one of alike terms would round the same way
// every time.
constexpr int64_t kLongestChain = 64;

// NV vectors of one token's gradient, `count` channels of the last of them.
template <int NV, class T, class E, class O>
FASTSSL_INLINE void sum_corners(const typename Corners<T>::Entry* entry,
                                const typename Corners<T>::Entry* last, const Grads<E>& grads,
                                int64_t channel, int64_t count, O* out) {
  constexpr int W = Simd<T>::kWidth;
  Vec<T> total[NV] = {};
  while (entry < last) {
    Vec<T> sum[NV] = {};
    for (const auto* const stop = std::min(last, entry + kLongestChain); entry < stop; ++entry) {
      const E* from = grads.data + entry->point * grads.stride + channel;
      const Vec<T> weight = broadcast<T>(entry->weight);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        sum[v] +=
            weight * (NV > 1 || count == W ? load_any<T>(from + v * W) : load_part<T>(from, count, T{0}));
    }
    for (int v = 0; v < NV; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < NV; ++v) {
    if (NV > 1 || count == W) {
      store_any<T>(out + channel + v * W, total[v]);
    } else {
      store_part<T>(out + channel, total[v], count);
    }
  }
}

// The gradient of `channels` channels of all tokens of one image.
template <class T, class E, class O>
void gather_tokens(const SampleTokens& op, const Corners<T>& corners, const Grads<E>& grads, int64_t channels,
                   O* out, int64_t y_stride, int64_t x_stride) {
  constexpr int W = Simd<T>::kWidth, MANY = 4;
  for (int64_t t = 0; t < op.height * op.width; ++t) {
    O* to = out + t / op.width * y_stride + t % op.width * x_stride;
    const auto *first = corners.entries + corners.starts[t], *last = corners.entries + corners.starts[t + 1];
    int64_t c = 0;
    for (; c + MANY * W <= channels; c += MANY * W) sum_corners<MANY, T>(first, last, grads, c, W, to);
    for (; c < channels; c += W)
      sum_corners<1, T>(first, last, grads, c, std::min<int64_t>(W, channels - c), to);
  }
}

// What `channels` channels add to the gradient of each point, to slopes[point][x, y].
template <bool UNIT, class T, class E, class G>
void slope_points(const SampleTokens& op, const Cell<T>* cells, const Map<E>& map, const E* zeros,
                  const Grads<G>& grads, int64_t channels, T* slopes) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t p = 0; p < op.points; ++p) {
    const Tokens<E> tokens(map, cells[p], zeros);
    const G* grad = grads.data + p * grads.stride;
    const T fy = cells[p].fy, fx = cells[p].fx;
    Vec<T> sum_x{}, sum_y{};
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t count = std::min<int64_t>(W, channels - c);
      const Vec<T> g = count == W ? load_any<T>(grad + c) : load_part<T>(grad + c, count, T{0});
      const Vec<T> nw = tokens.template load<T, UNIT>(0, c, count);
      const Vec<T> ne = tokens.template load<T, UNIT>(1, c, count);
      const Vec<T> sw = tokens.template load<T, UNIT>(2, c, count);
      const Vec<T> se = tokens.template load<T, UNIT>(3, c, count);
      sum_x += g * ((ne - nw) * (1 - fy) + (se - sw) * fy);
      sum_y += g * ((sw - nw) * (1 - fx) + (se - ne) * fx);
    }
    slopes[2 * p] = static_cast<T>(op.width) / 2 * sum_lanes<T>(sum_x);
    slopes[2 * p + 1] = static_cast<T>(op.height) / 2 * sum_lanes<T>(sum_y);
  }
}

// One image's block of channels.
template <class S>
struct BackwardItem {
  using T = Sum<S>;
  const Cell<T>* cells;
  Corners<T> corners;
  T *zeros, *packed_x, *packed_grad_x;  // null: not packed
  int64_t item, image, channel, count;

  template <class E>
  void run(const SampleTokens& op, const Grads<E>& grads) const {
    if (op.grad_x.data != nullptr) gradient_of_x(op, grads);
    if (op.slopes != nullptr) gradient_of_grid(op, grads);
  }

  template <class E>
  void gradient_of_x(const SampleTokens& op, const Grads<E>& grads) const {
    constexpr int W = Simd<T>::kWidth;
    const TokenMaps& m = op.grad_x;
    S* out = element_of<S>(m, image, channel);
    if (packed_grad_x == nullptr) {
      gather_tokens<T>(op, corners, grads, count, out, m.y_stride, m.x_stride);
    } else {
      gather_tokens<T>(op, corners, grads, count, packed_grad_x, op.width * W, W);
      unpack_map<T>(packed_grad_x, m, op.height, op.width, count, out);
    }
  }

  template <class E>
  void gradient_of_grid(const SampleTokens& op, const Grads<E>& grads) const {
    T* slopes = static_cast<T*>(op.slopes) + item * op.points * 2;
    const Map<S> map = map_of<S>(op, image, channel);
    const S* nothing = reinterpret_cast<const S*>(zeros);  // zero has the same bits in every type
    if (packed_x != nullptr) {
      pack_map<T>(map.data, op.x, op.height, op.width, count, packed_x);
      slope_points<true>(op, cells, packed_map<T>(op, packed_x), zeros, grads, count, slopes);
    } else if (is_unit(op.x.channel_stride, op.channels)) {
      slope_points<true>(op, cells, map, nothing, grads, count, slopes);
    } else {
      slope_points<false>(op, cells, map, nothing, grads, count, slopes);
    }
  }
};

template <class S>
void sample_backward(const SampleTokens& op, int64_t begin, int64_t end) {
  using T = Sum<S>;
  using Entry = typename Corners<T>::Entry;
  constexpr int W = Simd<T>::kWidth;
  const bool wants_x = op.grad_x.data != nullptr, wants_grid = op.slopes != nullptr;
  const int64_t block = sample_backward_block<S>(op), blocks = sample_backward_blocks<S>(op);
  const int64_t tokens = op.height * op.width;
  const int64_t starts = wants_x ? tokens + 1 : 0, entries = wants_x ? 4 * op.points : 0;
  const int64_t from = wants_grid && is_packed(op) ? (tokens + 1) * W : 0;
  const int64_t to = packs_grad_x(op) ? (tokens + 1) * W : 0;
  const int64_t rows = packs_grad(op) ? (op.points + 1) * W : 0;
  Scratch scratch(Scratch::bytes_of<Cell<T>>(op.points) + Scratch::bytes_of<int64_t>(starts) +
                  Scratch::bytes_of<Entry>(entries) + Scratch::bytes_of<T>(block) +
                  Scratch::bytes_of<T>(from) + Scratch::bytes_of<T>(to) + Scratch::bytes_of<T>(rows));
  Cell<T>* cells = scratch.take<Cell<T>>(op.points);
  BackwardItem<S> work{};
  work.cells = cells;
  work.corners.starts = scratch.take<int64_t>(starts);
  work.corners.entries = scratch.take<Entry>(entries);
  work.zeros = scratch.take<T>(block);
  work.packed_x = from > 0 ? scratch.take<T>(from) : nullptr;
  work.packed_grad_x = to > 0 ? scratch.take<T>(to) : nullptr;
  T* packed_grad = scratch.take<T>(rows);
  std::memset(work.zeros, 0, static_cast<size_t>(block) * sizeof(T));
  int64_t located = -1;
  for (work.item = begin; work.item < end; ++work.item) {
    work.image = work.item / blocks;
    work.channel = work.item % blocks * block;
    work.count = std::min(block, op.channels - work.channel);
    if (work.image != located) {
      locate<T>(op, work.image, cells);
      if (wants_x) work.corners.sort(op, cells);
      located = work.image;
    }
    const PointRows& g = op.grad;
    const S* grad =
        static_cast<const S*>(g.data) + work.image * g.batch_stride + work.channel * g.element_stride;
    if (packs_grad(op)) {
      PackFrom<T, S>::template panel<W>(packed_grad, grad, g.element_stride, g.point_stride, work.count,
                                        op.points);
      work.run(op, Grads<T>{packed_grad, W});
    } else {
      work.run(op, Grads<S>{grad, g.point_stride});
    }
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
