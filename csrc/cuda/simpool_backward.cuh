// simpool, backward, in two readings of x. Device code only, no torch headers; the launches in between are in
// simpool_launches.cuh, how blocks share the work in simpool_tiles.cuh.
//
// `token_gradients` gives the gradient dL of every logit, what LayerNorm's backward needs of each token, and
// the sums over tokens: G_hc = Σ dL x̂ and, with a power, those of the values' gradient. Since dL and the
// attention's rest sum to zero over the tokens, all gradients of parameters follow from these. The image's
// last block turns them into du (the gradient of the folded query), t (the centred folded query, see
// simpool.cuh) and the image's share of the parameters' gradients. After the small products that lead from du
// to the mean token, `parameter_gradients` adds up images, and `input_gradients` writes the gradient of x.
//
// With a power, dv = a E v^(gamma-1) where E = g S^(1/gamma-1) and S is what was pooled. The minimum gets
// -Σ dv, spread evenly over its ties: tau is what one of them gets.
#pragma once

#include "simpool_tiles.cuh"

namespace fastssl::cuda::simpool {

struct Result {
  void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t stride = 0;
  __device__ __forceinline__ void put(int64_t i, float v) const { store_float(data, storage, i * stride, v); }
};

struct Backward {
  Shape shape;
  const void* x = nullptr;
  void* grad_x = nullptr;
  Strides strides, grad_strides;
  const void *grad = nullptr, *grad_attention = nullptr;  // as x is stored; the second may be absent
  int64_t grad_image = 0, grad_channel = 0;
  Strides attention_strides;  // (B, H, N): token stands for the head, channel for the token
  const float *rows = nullptr, *vectors = nullptr, *minimum = nullptr;  // as `Forward` has them
  Values norm_weight, norm_bias;
  float scale = 0, gamma = 0, eps = 0;
  bool channel_minimum = false;
  Result grad_norm_weight, grad_norm_bias, grad_bq, grad_beta;  // without data where there is none
  // Workspace.
  float* partial = nullptr;  // (B, chunks, sums, C): sums over a chunk's tokens, see kSums
  float* tokens = nullptr;   // (B, 2 + H, N): Σ_c dv w / C, Σ_c dv w x̂ / C without the ties' share, H of dL
  float* du = nullptr;       // (B, H, C)
  float* t = nullptr;        // (B, H, C)
  float* images = nullptr;   // (B, sums, C): share of the weight's gradient, then V, X and T of ties
  float* ties = nullptr;     // (B, 2): Σ_c of V and T; behind it tau
  float* dq = nullptr;       // (B, C)
  float* dmean = nullptr;    // (B, C)
  float* beta = nullptr;     // a sum per block of `parameter_gradients`
  unsigned* counters = nullptr;  // zeros: (B + 2)
};

// Sums over tokens per channel: with a power V = Σ dv, X = Σ dv x̂, the same of ties (T counts them), then G
// of each head; without one G alone, and `images` holds the share of the weight alone.
__host__ __device__ constexpr int token_sums(int heads, bool power) { return heads + (power ? 4 : 0); }
__host__ __device__ constexpr int image_sums(bool power) { return power ? 4 : 1; }
constexpr int kColumns = kWarp;  // channels of a block of `parameter_gradients`

template <class X>
__device__ __forceinline__ float upstream(const Backward& p, int64_t image, int channel) {
  return to_float(static_cast<const X*>(p.grad)[image * p.grad_image + channel * p.grad_channel]);
}

// P = g w, or E with a power.
template <class X, bool Power>
__device__ __forceinline__ float upstream_of_pooled(const Backward& p, int64_t image, int channel) {
  const float g = upstream<X>(p, image, channel);
  if (!Power) return g * p.norm_weight.at(channel);
  const float pooled = p.vectors[(image * (3 + p.shape.heads) + 2) * p.shape.channels + channel];
  return g * powf(pooled, 1.f / p.gamma - 1.f);
}

__device__ __forceinline__ float minimum_of(const Backward& p, int64_t image, int channel) {
  return p.minimum[p.channel_minimum ? image * p.shape.channels + channel : 0];
}

// What one tie of the minimum gets.
__device__ __forceinline__ float tau_of(const Backward& p, int64_t image, int channel) {
  if (!p.channel_minimum) return p.ties[2 * p.shape.images];
  const float* const sums = p.images + image * image_sums(true) * p.shape.channels + channel;
  return -sums[p.shape.channels] / fmaxf(sums[int64_t{3} * p.shape.channels], 1.f);
}

// f(c, x_c) over channels first … end - 1 of a token, the lanes of the warp four at a time or one.
template <bool Quads, class X, class F>
__device__ __forceinline__ void for_channels(const X* row, int first, int end, int lane, const F& f) {
  if constexpr (Quads) {
    for (int c = first + 4 * lane; c < end; c += 4 * kWarp) {
      f(c, to_float4(*reinterpret_cast<const Quad<X>*>(row + c)));
    }
  } else {
    for (int c = first + lane; c < end; c += kWarp) f(c, to_float(row[c]));
  }
}

// Per-channel arrays of the block, in shared memory, zeros after the last channel.
struct Channels {
  float *factor, *weight, *bias, *low;  // P or E; the others with a power only
};

// Σ P x̂ over a head's channels, or Σ E v^gamma, Σ E w v^(gamma-1) and Σ E w v^(gamma-1) x̂.
template <bool Power>
struct HeadSums {
  float value = 0.f, shift = 0.f, stretch = 0.f;
  float mean, inverse, eps, exponent;

  __device__ __forceinline__ void add(float x, float factor, float weight, float bias, float low) {
    if (Power) {
      const float x_hat = standardized(x, mean, inverse);
      const float v = affine(x_hat, weight, bias) - low + eps;
      const float part = factor * slope(v, exponent);
      value += part * v;
      shift += part * weight;
      stretch += part * weight * x_hat;
    } else {
      value += factor * (x - mean);
    }
  }
  __device__ __forceinline__ void add(const Channels& of, int c, float x) {
    add(x, of.factor[c], Power ? of.weight[c] : 0.f, Power ? of.bias[c] : 0.f, Power ? of.low[c] : 0.f);
  }
  __device__ __forceinline__ void add(const Channels& of, int c, const float4& x) {
    const float4 f = *reinterpret_cast<const float4*>(of.factor + c);
    float4 w = {}, b = {}, l = {};
    if (Power) {
      w = *reinterpret_cast<const float4*>(of.weight + c);
      b = *reinterpret_cast<const float4*>(of.bias + c);
      l = *reinterpret_cast<const float4*>(of.low + c);
    }
    add(x.x, f.x, w.x, b.x, l.x);
    add(x.y, f.y, w.y, b.y, l.y);
    add(x.z, f.z, w.z, b.z, l.z);
    add(x.w, f.w, w.w, b.w, l.w);
  }
  __device__ __forceinline__ void over_warp() {
    value = warp_sum(value) * (Power ? 1.f : inverse);
    if (Power) {
      shift = warp_sum(shift);
      stretch = warp_sum(stretch);
    }
  }
};

// G of the heads, `Group` of them per reading of the tile.
template <int Group, class X>
__device__ __forceinline__ void sum_logit_gradients(float* sums,  // (H, C), of the chunk
                                                    const X* tile, const float* mean, const float* inverse,
                                                    const float* dlogits, const Shape& s, int count,
                                                    bool is_first) {
  constexpr int kWord = 4 / sizeof(X);
  const int channels = s.channels, pitch = pitch_of(channels, sizeof(X)), width = padded_tile(s.tile);
  for (int c = kWord * threadIdx.x; c < channels; c += kWord * kThreads) {
    for (int h0 = 0; h0 < s.heads; h0 += Group) {
      float sum[Group][kWord] = {};
#pragma unroll 4
      for (int n = 0; n < count; ++n) {
        const Word<X> word = *reinterpret_cast<const Word<X>*>(tile + n * pitch + c);
#pragma unroll
        for (int e = 0; e < kWord; ++e) {
          const float x_hat = standardized(to_float(word.at[e]), mean[n], inverse[n]);
#pragma unroll
          for (int g = 0; g < Group; ++g) sum[g][e] += dlogits[min(h0 + g, s.heads - 1) * width + n] * x_hat;
        }
      }
#pragma unroll
      for (int g = 0; g < Group; ++g) {
#pragma unroll
        for (int e = 0; e < kWord; ++e) {
          if (h0 + g >= s.heads || c + e >= channels) continue;
          float* const at = sums + int64_t{h0 + g} * channels + c + e;
          *at = sum[g][e] + (is_first ? 0.f : *at);
        }
      }
    }
  }
}

// What the chunks of an image make together; the image's last block.
template <class X, bool Power>
__device__ __forceinline__ void finish_tokens(const Backward& p, int64_t image) {
  const Shape& s = p.shape;
  const int thread = threadIdx.x, channels = s.channels, heads = s.heads;
  const int sums = token_sums(heads, Power);
  const float* const partial = p.partial + image * s.chunks * sums * channels;
  const auto over_chunks = [&](int which, int c) {
    float sum = 0.f;
#pragma unroll 4
    for (int j = 0; j < s.chunks; ++j) sum += __ldcg(partial + (int64_t{j} * sums + which) * channels + c);
    return sum;
  };
  const float* const vectors = p.vectors + image * (3 + heads) * channels;
  float* const mine = p.images + image * image_sums(Power) * channels;  // each thread its channels
  float shift = 0.f, ties = 0.f;
  for (int c = thread; c < channels; c += kThreads) {
    if (Power) {
      const float v = over_chunks(0, c), count = over_chunks(2, c);
      mine[c] = over_chunks(1, c);
      mine[channels + c] = v;
      mine[2 * channels + c] = over_chunks(3, c);
      mine[3 * channels + c] = count;
      shift += v;
      ties += count;
    } else {
      mine[c] = upstream<X>(p, image, c) * vectors[2 * channels + c];
    }
  }
  for (int h = 0; h < heads; ++h) {
    const float* const u = vectors + int64_t{3 + h} * channels;
    float* const du = p.du + (image * heads + h) * channels;
    float* const t = p.t + (image * heads + h) * channels;
    float sum = 0.f;
    for (int c = thread; c < channels; c += kThreads) {
      const float sum_over_tokens = over_chunks((Power ? 4 : 0) + h, c), weight = p.norm_weight.at(c);
      const float folded = p.scale * u[c];
      du[c] = p.scale * weight * sum_over_tokens;
      mine[c] += folded * sum_over_tokens;
      sum += folded * weight;
    }
    sum = block_sum(sum) / channels;
    for (int c = thread; c < channels; c += kThreads) t[c] = p.scale * p.norm_weight.at(c) * u[c] - sum;
  }
  if (!Power || p.channel_minimum) return;
  shift = block_sum(shift);
  ties = block_sum(ties);
  if (thread == 0) {
    p.ties[2 * image] = shift;
    p.ties[2 * image + 1] = ties;
  }
  if (!last_block(p.counters + s.images, static_cast<unsigned>(s.images))) return;
  shift = ties = 0.f;
  for (int64_t i = thread; i < s.images; i += kThreads) {
    shift += __ldcg(p.ties + 2 * i);
    ties += __ldcg(p.ties + 2 * i + 1);
  }
  shift = block_sum(shift);
  ties = block_sum(ties);
  if (thread == 0) p.ties[2 * s.images] = -shift / fmaxf(ties, 1.f);
}

// grid (B · chunks), block kThreads, dynamic shared memory token_gradients_bytes.
template <class X, bool Power>
__global__ void __launch_bounds__(kThreads, 3) token_gradients(Backward p) {
  FASTSSL_DYNAMIC_SHARED(float4, shared);
  constexpr int kWord = 4 / sizeof(X);
  const Shape& s = p.shape;
  const Place at = place_of(s);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int channels = s.channels, heads = s.heads, depth = channels / heads;
  const int pitch = pitch_of(channels, sizeof(X)), apart = padded(channels), width = padded_tile(s.tile);
  X* const tile = reinterpret_cast<X*>(shared);
  Channels of;
  of.factor = reinterpret_cast<float*>(tile + s.tile * pitch);
  of.weight = of.factor + apart;
  of.bias = of.weight + apart;
  of.low = of.bias + apart;
  float* const attention = of.factor + (Power ? 4 : 1) * apart;  // (H, width)
  float* const dlogits = attention + heads * width;              // (H, width)
  float* const mean = dlogits + heads * width;
  float* const inverse = mean + width;
  float* const delta = inverse + width;  // (H): Σ_n a da
  float* const slopes = delta + heads;   // (H): Σ P of the head's channels
  const X* const x = static_cast<const X*>(p.x) + at.image * p.strides.image;
  const X* const grad_attention = p.grad_attention == nullptr ? nullptr
                                                              : static_cast<const X*>(p.grad_attention) +
                                                                    at.image * p.attention_strides.image;
  const auto grad_of_attention = [&](int h, int n) {
    return grad_attention == nullptr
               ? 0.f
               : to_float(grad_attention[h * p.attention_strides.token + n * p.attention_strides.channel]);
  };
  const float* const rows = p.rows + at.image * (2 + 2 * heads) * s.tokens;
  float* const tokens = p.tokens + at.image * (2 + heads) * s.tokens;
  const float* const pooled = p.vectors + (at.image * (3 + heads) + 2) * channels;
  float* const sums = p.partial + (at.image * s.chunks + at.chunk) * token_sums(heads, Power) * channels;

  for (int c = thread; c < apart; c += kThreads) {
    const bool inside = c < channels;
    of.factor[c] = inside ? upstream_of_pooled<X, Power>(p, at.image, c) : 0.f;
    if (Power) {
      of.weight[c] = inside ? p.norm_weight.at(c) : 0.f;
      of.bias[c] = inside ? p.norm_bias.at(c) : 0.f;
      of.low[c] = inside ? minimum_of(p, at.image, c) : 0.f;
    }
  }
  __syncthreads();
  for (int h = warp; h < heads; h += kWarps) {
    float sum = 0.f, slopes_sum = 0.f, of_attention = 0.f;
    for (int c = h * depth + lane; c < (h + 1) * depth; c += kWarp) {
      sum += of.factor[c] * pooled[c];
      slopes_sum += of.factor[c];
    }
    if (grad_attention != nullptr) {
      for (int n = lane; n < s.tokens; n += kWarp)
        of_attention += rows[int64_t{2 + heads + h} * s.tokens + n] * grad_of_attention(h, n);
    }
    sum = warp_sum(sum) * (Power ? 1.f / p.gamma : 1.f) + warp_sum(of_attention);
    slopes_sum = warp_sum(slopes_sum);
    if (lane == 0) {
      delta[h] = sum;
      slopes[h] = slopes_sum;
    }
  }
  for (int first = at.first; first < at.end; first += s.tile) {
    const int count = min(s.tile, at.end - first);
    __syncthreads();  // the tile before has been read
    load_tile(tile, x + first * p.strides.token, p.strides, count, channels);
    __syncthreads();
    for (int n = warp; n < count; n += kWarps) {
      const X* const row = tile + n * pitch;
      const float m = rows[first + n], r = rows[int64_t{s.tokens} + first + n];
      float shift = 0.f, stretch = 0.f;
      for (int h = 0; h < heads; ++h) {
        HeadSums<Power> head;
        head.mean = m;
        head.inverse = r;
        head.eps = p.eps;
        head.exponent = p.gamma - 1.f;
        const auto add = [&](int c, const auto& v) { head.add(of, c, v); };
        if (depth % 4 == 0 || heads == 1) {
          for_channels<true>(row, h * depth, (h + 1) * depth, lane, add);
        } else {
          for_channels<false>(row, h * depth, (h + 1) * depth, lane, add);
        }
        head.over_warp();
        const int64_t line = int64_t{s.tokens} * h + first + n;
        const float logit = rows[int64_t{2} * s.tokens + line];
        const float a = rows[int64_t{2 + heads} * s.tokens + line];
        const float da = head.value * (Power ? 1.f / p.gamma : 1.f) + grad_of_attention(h, first + n);
        const float dlogit = a * (da - delta[h]);
        shift += a * (Power ? head.shift : slopes[h]);
        stretch += a * (Power ? head.stretch : head.value) + dlogit * logit;
        if (lane == 0) {
          attention[h * width + n] = a;
          dlogits[h * width + n] = dlogit;
          tokens[int64_t{2} * s.tokens + line] = dlogit;
        }
      }
      if (lane == 0) {
        mean[n] = m;
        inverse[n] = r;
        tokens[first + n] = shift / channels;
        tokens[int64_t{s.tokens} + first + n] = stretch / channels;
      }
    }
    __syncthreads();
    const bool is_first = first == at.first;
    if (Power) {
      for (int c = kWord * thread; c < channels; c += kWord * kThreads) {
        float sum[4][kWord] = {};
        int head[kWord];
#pragma unroll
        for (int e = 0; e < kWord; ++e) head[e] = min(c + e, channels - 1) / depth;
#pragma unroll 2
        for (int n = 0; n < count; ++n) {
          const Word<X> word = *reinterpret_cast<const Word<X>*>(tile + n * pitch + c);
#pragma unroll
          for (int e = 0; e < kWord; ++e) {
            const float x_hat = standardized(to_float(word.at[e]), mean[n], inverse[n]);
            const float y = affine(x_hat, of.weight[c + e], of.bias[c + e]), low = of.low[c + e];
            const float dv =
                attention[head[e] * width + n] * of.factor[c + e] * slope(y - low + p.eps, p.gamma - 1.f);
            const float tie = y == low ? 1.f : 0.f;
            sum[0][e] += dv;
            sum[1][e] += dv * x_hat;
            sum[2][e] += tie;
            sum[3][e] += tie * x_hat;
          }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int e = 0; e < kWord; ++e) {
            if (c + e >= channels) continue;
            float* const to = sums + int64_t{k} * channels + c + e;
            *to = sum[k][e] + (is_first ? 0.f : *to);
          }
        }
      }
    }
    float* const of_heads = sums + int64_t{Power ? 4 : 0} * channels;
    if (heads == 1) {
      sum_logit_gradients<1>(of_heads, tile, mean, inverse, dlogits, s, count, is_first);
    } else {
      sum_logit_gradients<4>(of_heads, tile, mean, inverse, dlogits, s, count, is_first);
    }
  }
  if (last_block(p.counters + at.image, s.chunks)) finish_tokens<X, Power>(p, at.image);
}

}  // namespace fastssl::cuda::simpool
