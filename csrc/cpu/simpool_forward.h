// simpool on the CPU, forward: statistics of the tokens, and the attention with the pooled values. Included
// once per instruction set by simpool.h.

namespace fastssl::cpu::FASTSSL_ISA {

// μ and r = 1/√(var + ε) of one token. What rounding left in μ is corrected by the second sum.
template <class T>
FASTSSL_INLINE void token_statistics(const T* row, int64_t channels, T epsilon, T& mean, T& inverse) {
  constexpr int W = Simd<T>::kWidth;
  const T share = T{1} / static_cast<T>(channels);
  Vec<T> sum[4] = {};
  for_channels<T>(0, channels, [&](int64_t c, auto vectors, int64_t lanes) {
    for (int v = 0; v < vectors; ++v) sum[v] += load_some<T>(row + c + v * W, lanes);
  });
  const T rough = sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) * share;
  Vec<T> rest[4] = {}, squares[4] = {};
  for_channels<T>(0, channels, [&](int64_t c, auto vectors, int64_t lanes) {
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> d = load_some<T>(row + c + v * W, lanes, rough) - rough;
      rest[v] += d;
      squares[v] += d * d;
    }
  });
  const T left = sum_lanes<T>((rest[0] + rest[1]) + (rest[2] + rest[3])) * share;
  const T square = sum_lanes<T>((squares[0] + squares[1]) + (squares[2] + squares[3])) * share;
  mean = rough + left;
  inverse = T{1} / std::sqrt(std::max(square - left * left, T{0}) + epsilon);
}

// Images [begin, end): μ and r of their tokens, their mean token, and with a power the minimum of y.
template <class T>
void simpool_statistics(const SimPool<T>& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth;
  TokenRows<T> tokens{op.x, op.channels};
  Scratch scratch(Scratch::bytes_of<T>(tokens.copy_size()));
  tokens.copy = scratch.take<T>(tokens.copy_size());
  const T infinity = std::numeric_limits<T>::infinity();
  for (int64_t image = begin; image < end; ++image) {
    T* mean_token = vector_of(op, image, kVectorMean);
    std::fill_n(mean_token, op.channels, T{0});
    T* minimum = op.channel_min ? op.minimum + image * op.channels : nullptr;
    if (minimum != nullptr) std::fill_n(minimum, op.channels, infinity);
    Vec<T> smallest = broadcast<T>(infinity);
    for (int64_t first = 0; first < op.tokens; first += kBlockTokens) {
      const Block<T> block = block_of(op, tokens, image, first);
      for (int64_t r = 0; r < block.count; ++r)
        token_statistics(block.row(r), op.channels, op.norm_eps, row_of(op, image, kRowMean)[first + r],
                         row_of(op, image, kRowInverse)[first + r]);
      for_channels<T>(0, op.channels, [&](int64_t c, auto vectors, int64_t lanes) {
        for (int v = 0; v < vectors; ++v) {
          Vec<T> sum{};
          for (int64_t r = 0; r < block.count; ++r) sum += load_some<T>(block.row(r) + c + v * W, lanes);
          T* at = mean_token + c + v * W;
          store_some<T>(at, load_some<T>(at, lanes) + sum, lanes);
        }
      });
      if (op.power == kMean) continue;
      for_channels<T>(0, op.channels, [&](int64_t c, auto vectors, int64_t lanes) {
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = c + v * W;
          const Vec<T> weight = load_some<T>(op.weight + at, lanes), bias = load_some<T>(op.bias + at, lanes);
          Vec<T> least = broadcast<T>(infinity);
          for (int64_t r = 0; r < block.count; ++r) {
            const Vec<T> x = (load_some<T>(block.row(r) + at, lanes) - block.mean[r]) * block.inverse[r];
            const Vec<T> y = normalized<T>(x, weight, bias);
            least = y < least ? y : least;
          }
          if (lanes < W) least = keep_lanes<T>(least, lanes, infinity);
          smallest = least < smallest ? least : smallest;
          if (minimum != nullptr) {
            const Vec<T> before = load_some<T>(minimum + at, lanes);
            store_some<T>(minimum + at, least < before ? least : before, lanes);
          }
        }
      });
    }
    if (op.power != kMean && minimum == nullptr) op.minima[image] = -max_lanes<T>(-smallest);
    const T share = T{1} / static_cast<T>(op.tokens);
    for (int64_t c = 0; c < op.channels; ++c) mean_token[c] *= share;
  }
}

// sum_c += Σ_r share_r v_rc^γ for channels [from, to), with v = y − minimum + ε.
template <class T, int POWER>
void add_powers(const SimPool<T>& op, const PerChannel<T>& minimum, const T* share, const Block<T>& block,
                int64_t from, int64_t to, T* sum) {
  constexpr int W = Simd<T>::kWidth;
  const T exponent = op.gamma - 1;
  const Vec<T> eps = broadcast<T>(op.eps);
  for_channels<T>(from, to, [&](int64_t c, auto vectors, int64_t lanes) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = c + v * W;
      const Vec<T> weight = load_some<T>(op.weight + at, lanes), bias = load_some<T>(op.bias + at, lanes);
      const Vec<T> least = minimum.at(at, lanes);
      Vec<T> part{};
      for (int64_t r = 0; r < block.count; ++r) {
        const Vec<T> x = (load_some<T>(block.row(r) + at, lanes) - block.mean[r]) * block.inverse[r];
        const Vec<T> value = max<T>(eps, normalized<T>(x, weight, bias) - least + eps);
        part += lower_power<T, POWER>(value, exponent) * value * share[r];
      }
      store_some<T>(sum + at, load_some<T>(sum + at, lanes) + part, lanes);
    }
  });
}

// Images [begin, end): logits, attention, pooled values and the result. One look at each token: sums are kept
// relative to the largest logit so far.
template <class T, int POWER>
void simpool_attend(const SimPool<T>& op, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::kWidth;
  constexpr T kLog2E = static_cast<T>(1.4426950408889634);
  const int64_t depth = op.channels / op.heads;
  TokenRows<T> tokens{op.x, op.channels};
  Scratch scratch(Scratch::bytes_of<T>(tokens.copy_size()) + Scratch::bytes_of<T>(op.heads * op.channels) +
                  Scratch::bytes_of<T>(op.heads) + Scratch::bytes_of<double>(op.heads));
  tokens.copy = scratch.take<T>(tokens.copy_size());
  T* queries = scratch.take<T>(op.heads * op.channels);
  T* largest = scratch.take<T>(op.heads);
  // Tokens are added one by one: in float, thousands of them would lose digits.
  double* total = scratch.take<double>(op.heads);
  for (int64_t image = begin; image < end; ++image) {
    centred_queries(op, image, queries);
    const PerChannel<T> minimum = per_channel(op, op.minimum, image);
    T* pooled = vector_of(op, image, kVectorPooled);
    std::fill_n(pooled, op.channels, T{0});
    std::fill_n(largest, op.heads, -std::numeric_limits<T>::infinity());
    std::fill_n(total, op.heads, 0.0);
    for (int64_t first = 0; first < op.tokens; first += kBlockTokens) {
      const Block<T> block = block_of(op, tokens, image, first);
      for (int64_t h = 0; h < op.heads; ++h) {
        T logits[kBlockTokens], share[kBlockTokens];
        centred_products(queries + h * op.channels, block, 0, op.channels, logits);
        T peak = largest[h];
        for (int64_t r = 0; r < block.count; ++r) {
          logits[r] *= block.inverse[r];
          peak = logits[r] > peak ? logits[r] : peak;
        }
        std::copy_n(logits, block.count, row_of(op, image, kRowLogits + h) + first);
        for (int64_t r = block.count; r < kBlockTokens; ++r) logits[r] = peak;
        if (peak > largest[h]) {
          const T factor = exp2(broadcast<T>((largest[h] - peak) * kLog2E))[0];
          total[h] *= double{factor};
          for (int64_t c = h * depth; c < (h + 1) * depth; ++c) pooled[c] *= factor;
          largest[h] = peak;
        }
        for (int64_t r = 0; r < kBlockTokens; r += W)
          store<T>(share + r, exp2((load<T>(logits + r) - peak) * kLog2E));
        for (int64_t r = 0; r < block.count; ++r) {
          total[h] += double{share[r]};
          if (POWER == kMean) share[r] *= block.inverse[r];
        }
        if constexpr (POWER == kMean) {
          add_centred(share, block, h * depth, (h + 1) * depth, pooled);
        } else {
          add_powers<T, POWER>(op, minimum, share, block, h * depth, (h + 1) * depth, pooled);
        }
      }
    }
    for (int64_t h = 0; h < op.heads; ++h) {
      const T inverse = static_cast<T>(1 / total[h]);
      const T* logits = row_of(op, image, kRowLogits + h);
      T* attention = row_of(op, image, kRowLogits + op.heads + h);
      for (int64_t n = 0; n < op.tokens; n += W) {
        const int64_t lanes = std::min<int64_t>(W, op.tokens - n);
        const Vec<T> l = load_some<T>(logits + n, lanes);
        store_some<T>(attention + n, exp2((l - largest[h]) * kLog2E) * inverse, lanes);
      }
      for (int64_t c = h * depth; c < (h + 1) * depth; ++c) {
        pooled[c] *= inverse;
        op.out[image * op.channels + c] = POWER == kMean     ? pooled[c] * op.weight[c] + op.bias[c]
                                          : POWER == kSquare ? std::sqrt(pooled[c]) + op.beta
                                                             : std::pow(pooled[c], T{1} / op.gamma) + op.beta;
      }
    }
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
