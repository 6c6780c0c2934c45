// simpool on the CPU, backward: the second look at the tokens, for their own gradients. Included once per
// instruction set by simpool.h.

namespace fastssl::cpu::FASTSSL_ISA {

// Where tokens' gradients go: rows of T in place, or through a block in a cache.
template <class T>
struct GradientRows {
  const TokenRows<T> target;

  bool in_place() const { return target.in_place(); }
  T* at(int64_t image, int64_t first, int64_t& stride) const {
    stride = in_place() ? target.x.row_stride : target.copy_stride();
    return in_place() ? static_cast<T*>(element(target.x, image, 0, first)) : target.copy;
  }
  void done(int64_t image, int64_t first, int64_t count) const {
    if (!in_place())
      store_strip<T>(target.copy, target.copy_stride(), count, target.channels, target.x, image, 0, first);
  }
};

// What both kernels keep of one image, and of one block: dL_h r of its tokens.
template <class T>
struct InputScratch {
  const SimPool<T>& op;
  TokenRows<T> tokens, gradients;
  T *queries = nullptr, *weights = nullptr, *mean_gradient = nullptr, *factors = nullptr;

  explicit InputScratch(const SimPool<T>& op)
      : op(op), tokens{op.x, op.channels}, gradients{op.grad_x, op.channels} {}
  template <class Take>
  void lay_out(Take&& take) {
    take(tokens.copy, tokens.copy_size());
    take(gradients.copy, gradients.copy_size());
    take(queries, op.heads * op.channels);
    take(weights, op.channels);
    take(mean_gradient, op.channels);
    take(factors, op.heads * kBlockTokens);
  }
  size_t bytes() {
    size_t sum = 0;
    lay_out([&](T*&, int64_t count) { sum += Scratch::bytes_of<T>(count); });
    return sum;
  }
  void place(Scratch& scratch) {
    lay_out([&](T*& pointer, int64_t count) { pointer = scratch.take<T>(count); });
  }
  void begin_image(int64_t image) const {
    centred_queries(op, image, queries);
    const T share = T{1} / static_cast<T>(op.tokens);
    for (int64_t c = 0; c < op.channels; ++c)
      mean_gradient[c] = op.mean_gradients[image * op.channels + c] * share;
  }
  void begin_block(const Block<T>& block, int64_t image, int64_t first) const {
    for (int64_t h = 0; h < op.heads; ++h)
      for (int64_t r = 0; r < block.count; ++r)
        factors[h * kBlockTokens + r] =
            token_gradient(op, image, kTokenLogits + h)[first + r] * block.inverse[r];
  }
  // sum += Σ_h dL_h r t'_h of token r.
  template <int NV>
  FASTSSL_INLINE void add_logits(int64_t r, int64_t c, int64_t lanes, Vec<T>* sum) const {
    for (int64_t h = 0; h < op.heads; ++h) {
      const Vec<T> factor = broadcast<T>(factors[h * kBlockTokens + r]);
      for (int v = 0; v < NV; ++v)
        sum[v] += factor * load_some<T>(queries + h * op.channels + c + v * Simd<T>::kWidth, lanes);
    }
  }
};

// Images [begin, end) without a power: dx = r a P + Σ_h r dL_h t'_h + (dmean / N − r s1) − (x − μ) r² s2.
template <class T>
void simpool_input(const SimPool<T>& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t depth = op.channels / op.heads;
  InputScratch<T> own(op);
  Scratch scratch(own.bytes());
  own.place(scratch);
  const GradientRows<T> out{own.gradients};
  for (int64_t image = begin; image < end; ++image) {
    own.begin_image(image);
    for (int64_t c = 0; c < op.channels; ++c)
      own.weights[c] = op.grad[image * op.channels + c] * op.weight[c];
    for (int64_t first = 0; first < op.tokens; first += kBlockTokens) {
      const Block<T> block = block_of(op, own.tokens, image, first);
      int64_t stride;
      T* to = out.at(image, first, stride);
      own.begin_block(block, image, first);
      T constant[kBlockTokens], slope[kBlockTokens];
      for (int64_t r = 0; r < block.count; ++r) {
        constant[r] = -block.inverse[r] * token_gradient(op, image, kTokenS1)[first + r];
        slope[r] = -block.inverse[r] * block.inverse[r] * token_gradient(op, image, kTokenS2)[first + r];
      }
      for (int64_t head = 0; head < op.heads; ++head) {
        const T* attention = row_of(op, image, kRowLogits + op.heads + head) + first;
        for_channels<T>(head * depth, (head + 1) * depth, [&](int64_t c, auto vectors, int64_t lanes) {
          constexpr int NV = vectors;
          Vec<T> p[NV], shift[NV];
          for (int v = 0; v < NV; ++v) {
            p[v] = load_some<T>(own.weights + c + v * W, lanes);
            shift[v] = load_some<T>(own.mean_gradient + c + v * W, lanes);
          }
          for (int64_t r = 0; r < block.count; ++r) {
            const Vec<T> weight = broadcast<T>(attention[r] * block.inverse[r]);
            const Vec<T> mean = broadcast<T>(block.mean[r]), by = broadcast<T>(slope[r]);
            Vec<T> sum[NV];
            for (int v = 0; v < NV; ++v)
              sum[v] = shift[v] + constant[r] + weight * p[v] +
                       by * (load_some<T>(block.row(r) + c + v * W, lanes) - mean);
            own.template add_logits<NV>(r, c, lanes, sum);
            for (int v = 0; v < NV; ++v) store_some<T>(to + r * stride + c + v * W, sum[v], lanes);
          }
        });
      }
      out.done(image, first, block.count);
    }
  }
}

// The same with a power. dy∘w without the logits' share is left in the gradient's rows first: its two means
// are needed before any of it is done.
template <class T, int POWER>
void simpool_power_input(const SimPool<T>& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t depth = op.channels / op.heads;
  const T exponent = op.gamma - 1, share = T{1} / static_cast<T>(op.channels);
  InputScratch<T> own(op);
  Scratch scratch(own.bytes());
  own.place(scratch);
  const GradientRows<T> out{own.gradients};
  const Vec<T> eps = broadcast<T>(op.eps);
  for (int64_t image = begin; image < end; ++image) {
    own.begin_image(image);
    power_gradients(op, image, own.weights);
    const PerChannel<T> minimum = per_channel(op, op.minimum, image);
    const PerChannel<T> tie = per_channel(op, op.tie_gradients, image);
    for (int64_t first = 0; first < op.tokens; first += kBlockTokens) {
      const Block<T> block = block_of(op, own.tokens, image, first);
      int64_t stride;
      T* to = out.at(image, first, stride);
      own.begin_block(block, image, first);
      Vec<T> s1_sum[kBlockTokens] = {}, s2_sum[kBlockTokens] = {};
      for (int64_t head = 0; head < op.heads; ++head) {
        const T* attention = row_of(op, image, kRowLogits + op.heads + head) + first;
        for_channels<T>(head * depth, (head + 1) * depth, [&](int64_t c, auto vectors, int64_t lanes) {
          for (int v = 0; v < vectors; ++v) {
            const int64_t at = c + v * W;
            const Vec<T> weight = load_some<T>(op.weight + at, lanes),
                         bias = load_some<T>(op.bias + at, lanes);
            const Vec<T> factor = load_some<T>(own.weights + at, lanes), least = minimum.at(at, lanes);
            const Vec<T> tied = tie.at(at, lanes);
            for (int64_t r = 0; r < block.count; ++r) {
              const Vec<T> x = (load_some<T>(block.row(r) + at, lanes) - block.mean[r]) * block.inverse[r];
              const Vec<T> y = normalized<T>(x, weight, bias), value = max<T>(eps, y - least + eps);
              const Vec<T> dv = factor * lower_power<T, POWER>(value, exponent) * attention[r];
              const Vec<T> dw = keep_some<T>((dv + (y == least ? tied : Vec<T>{})) * weight, lanes);
              s1_sum[r] += dw;
              s2_sum[r] += dw * x;
              store_some<T>(to + r * stride + at, dw, lanes);
            }
          }
        });
      }
      T s1[kBlockTokens], s2[kBlockTokens];
      for (int64_t r = 0; r < block.count; ++r) {
        s1[r] = sum_lanes<T>(s1_sum[r]) * share;
        s2[r] = sum_lanes<T>(s2_sum[r]) * share + token_gradient(op, image, kTokenS2)[first + r];
      }
      for_channels<T>(0, op.channels, [&](int64_t c, auto vectors, int64_t lanes) {
        constexpr int NV = vectors;
        for (int64_t r = 0; r < block.count; ++r) {
          const T inverse = block.inverse[r];
          const Vec<T> constant = broadcast<T>(inverse * s1[r]), by = broadcast<T>(inverse * inverse * s2[r]);
          Vec<T> sum[NV];
          for (int v = 0; v < NV; ++v) {
            const int64_t at = c + v * W;
            sum[v] = load_some<T>(to + r * stride + at, lanes) * inverse - constant +
                     load_some<T>(own.mean_gradient + at, lanes) -
                     by * (load_some<T>(block.row(r) + at, lanes) - block.mean[r]);
          }
          own.template add_logits<NV>(r, c, lanes, sum);
          for (int v = 0; v < NV; ++v) store_some<T>(to + r * stride + c + v * W, sum[v], lanes);
        }
      });
      out.done(image, first, block.count);
    }
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
