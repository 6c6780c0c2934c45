// simpool on the CPU, backward: the gradients of the logits, and what they leave for the parameters. Included
// once per instruction set by simpool.h.
//
// With dL = a (da − δ), δ = Σ_n a_n da_n, and dy = a∘P + Σ_h dL_h scale u_h, LayerNorm's backward is
//   dx = r (dy∘w − s1 − x̂ s2) + dmean / N,   s1 = mean_c(dy∘w), s2 = mean_c(dy∘w∘x̂).
// The mean token's gradient needs the sums G_h = Σ_n dL_hn x̂_n over all tokens, and these need δ. δ could be
// had from the pooled values alone, but then dL would not vanish exactly where softmax is saturated.

namespace fastssl::cpu::FASTSSL_ISA {

template <class T>
T* token_gradient(const SimPool<T>& op, int64_t image, int64_t which) {
  return op.token_gradients + (image * (2 + op.heads) + which) * op.tokens;
}

// da → dL of one head of an image, in place, and its share of s2. da enters relative to its value where a is
// largest: in a saturated row everything else is small.
template <class T>
void gradient_of_logits(const SimPool<T>& op, int64_t image, int64_t head) {
  const T* logits = row_of(op, image, kRowLogits + head);
  const T* attention = row_of(op, image, kRowLogits + op.heads + head);
  T *da = token_gradient(op, image, kTokenLogits + head), *s2 = token_gradient(op, image, kTokenS2);
  if (op.grad_attention != nullptr) {
    const T* upstream = op.grad_attention + (image * op.heads + head) * op.tokens;
    for (int64_t n = 0; n < op.tokens; ++n) da[n] += upstream[n];
  }
  const T pivot = da[std::max_element(attention, attention + op.tokens) - attention];
  double sum = 0, total = 0;
  for (int64_t n = 0; n < op.tokens; ++n) {
    da[n] -= pivot;
    sum += double{attention[n]} * double{da[n]};
    total += double{attention[n]};
  }
  const T delta = static_cast<T>(sum / total), share = T{1} / static_cast<T>(op.channels);
  for (int64_t n = 0; n < op.tokens; ++n) {
    da[n] = attention[n] * (da[n] - delta);
    s2[n] += da[n] * logits[n] * share;
  }
}
// dL of all heads of an image, and G.
template <class T>
void finish_logits(const SimPool<T>& op, const TokenRows<T>& tokens, int64_t image) {
  for (int64_t h = 0; h < op.heads; ++h) gradient_of_logits(op, image, h);
  T* sums = op.logit_sums + image * op.heads * op.channels;
  std::fill_n(sums, op.heads * op.channels, T{0});
  for (int64_t first = 0; first < op.tokens; first += kBlockTokens) {
    const Block<T> block = block_of(op, tokens, image, first);
    for (int64_t h = 0; h < op.heads; ++h) {
      const T* dl = token_gradient(op, image, kTokenLogits + h) + first;
      T factor[kBlockTokens];
      for (int64_t r = 0; r < block.count; ++r) factor[r] = dl[r] * block.inverse[r];
      add_centred(factor, block, 0, op.channels, sums + h * op.channels);
    }
  }
}

// Images [begin, end) without a power: dL, s1 and s2 of each token, and G.
template <class T>
void simpool_tokens(const SimPool<T>& op, int64_t begin, int64_t end) {
  const int64_t depth = op.channels / op.heads;
  const T share = T{1} / static_cast<T>(op.channels);
  TokenRows<T> tokens{op.x, op.channels};
  Scratch scratch(Scratch::bytes_of<T>(tokens.copy_size()) + Scratch::bytes_of<T>(op.channels) +
                  Scratch::bytes_of<T>(op.heads));
  tokens.copy = scratch.take<T>(tokens.copy_size());
  T* p = scratch.take<T>(op.channels);   // P = g∘w
  T* means = scratch.take<T>(op.heads);  // Σ_{c∈h} P_c / C
  for (int64_t image = begin; image < end; ++image) {
    std::fill_n(means, op.heads, T{0});
    for (int64_t c = 0; c < op.channels; ++c) {
      p[c] = op.grad[image * op.channels + c] * op.weight[c];
      means[c / depth] += p[c] * share;
    }
    T *s1 = token_gradient(op, image, kTokenS1), *s2 = token_gradient(op, image, kTokenS2);
    std::fill_n(s1, op.tokens, T{0});
    std::fill_n(s2, op.tokens, T{0});
    for (int64_t first = 0; first < op.tokens; first += kBlockTokens) {
      const Block<T> block = block_of(op, tokens, image, first);
      for (int64_t h = 0; h < op.heads; ++h) {
        const T* attention = row_of(op, image, kRowLogits + op.heads + h) + first;
        T* da = token_gradient(op, image, kTokenLogits + h) + first;
        centred_products(p, block, h * depth, (h + 1) * depth, da);
        for (int64_t r = 0; r < block.count; ++r) {
          da[r] *= block.inverse[r];
          s1[first + r] += attention[r] * means[h];
          s2[first + r] += attention[r] * da[r] * share;
        }
      }
    }
    finish_logits(op, tokens, image);
  }
}

// E = g S^(1/γ−1), which times a v^(γ−1) is the gradient of v.
template <class T>
void power_gradients(const SimPool<T>& op, int64_t image, T* e) {
  const T *grad = op.grad + image * op.channels, *pooled = vector_of(op, image, kVectorPooled);
  for (int64_t c = 0; c < op.channels; ++c) e[c] = grad[c] * std::pow(pooled[c], T{1} / op.gamma - 1);
}

// The same with a power: s2 is the logits' share alone; also V = Σ_n dv, X = Σ_n dv x̂, and the number of ties
// of the minimum and the sum of their x̂, per channel.
template <class T, int POWER>
void simpool_power_tokens(const SimPool<T>& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t depth = op.channels / op.heads;
  const T exponent = op.gamma - 1;
  TokenRows<T> tokens{op.x, op.channels};
  Scratch scratch(Scratch::bytes_of<T>(tokens.copy_size()) + Scratch::bytes_of<T>(op.channels));
  tokens.copy = scratch.take<T>(tokens.copy_size());
  T* e = scratch.take<T>(op.channels);
  const Vec<T> eps = broadcast<T>(op.eps);
  for (int64_t image = begin; image < end; ++image) {
    power_gradients(op, image, e);
    T* sums = op.power_sums + image * 4 * op.channels;
    std::fill_n(sums, 4 * op.channels, T{0});
    std::fill_n(token_gradient(op, image, kTokenS2), op.tokens, T{0});
    const PerChannel<T> minimum = per_channel(op, op.minimum, image);
    for (int64_t first = 0; first < op.tokens; first += kBlockTokens) {
      const Block<T> block = block_of(op, tokens, image, first);
      for (int64_t h = 0; h < op.heads; ++h) {
        const T* attention = row_of(op, image, kRowLogits + op.heads + h) + first;
        Vec<T> da_sum[kBlockTokens] = {};
        for_channels<T>(h * depth, (h + 1) * depth, [&](int64_t c, auto vectors, int64_t lanes) {
          for (int v = 0; v < vectors; ++v) {
            const int64_t at = c + v * W;
            const Vec<T> weight = load_some<T>(op.weight + at, lanes),
                         bias = load_some<T>(op.bias + at, lanes);
            const Vec<T> factor = load_some<T>(e + at, lanes), least = minimum.at(at, lanes);
            Vec<T> sum{}, product{}, ties{}, tie_sum{};
            for (int64_t r = 0; r < block.count; ++r) {
              const Vec<T> x = (load_some<T>(block.row(r) + at, lanes) - block.mean[r]) * block.inverse[r];
              const Vec<T> y = normalized<T>(x, weight, bias), value = max<T>(eps, y - least + eps);
              const Vec<T> power = keep_some<T>(factor * lower_power<T, POWER>(value, exponent), lanes);
              const Vec<T> dv = power * attention[r];
              da_sum[r] += power * value;
              sum += dv;
              product += dv * x;
              ties += y == least ? Vec<T>{} + T{1} : Vec<T>{};
              tie_sum += y == least ? x : Vec<T>{};
            }
            const Vec<T> parts[4] = {sum, product, ties, tie_sum};
            for (int i = 0; i < 4; ++i) {
              T* to = sums + i * op.channels + at;
              store_some<T>(to, load_some<T>(to, lanes) + parts[i], lanes);
            }
          }
        });
        T* da = token_gradient(op, image, kTokenLogits + h) + first;
        for (int64_t r = 0; r < block.count; ++r) da[r] = sum_lanes<T>(da_sum[r]) / op.gamma;
      }
    }
    finish_logits(op, tokens, image);
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
