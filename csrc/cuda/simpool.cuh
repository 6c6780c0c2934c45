// simpool, forward, in two readings of x. Device code only, no torch headers; the launches in between are in
// simpool_launches.cuh, how blocks share the work in simpool_tiles.cuh.
//
// `statistics` gives mean and inverse deviation of every token, the mean token, and the minimum of the
// normalised values if there is a power. `pool` is attention of one query per head, split over the tokens of
// an image: logits from the folded query, a running softmax per chunk, the weighted sum, and in the image's
// last block what the chunks make together.
//
// x̂ = (x − mean) · inverse, y = x̂ w + b. With t = scale · u w, minus its mean over the channels, a logit is
// t · x̂ up to what is the same for all tokens; centred t keeps large means of x out of the products.
#pragma once

#include "simpool_tiles.cuh"

namespace fastssl::cuda::simpool {

struct Forward {
  Shape shape;
  const void* x = nullptr;
  Strides strides;
  Values norm_weight, norm_bias, beta;
  float scale = 0, gamma = 0, eps = 0, norm_eps = 0;
  bool channel_minimum = false;
  // Results, contiguous. rows: mean, inverse, H of logits, H of attention; vectors: mean token, query,
  // pooled, H of folded queries.
  void* out = nullptr;        // (B, C)
  void* attention = nullptr;  // (B, H, N)
  float* rows = nullptr;      // (B, 2 + 2H, N)
  float* vectors = nullptr;   // (B, 3 + H, C)
  float* minimum = nullptr;   // (1,) or (B, C)
  // Workspace.
  float* partial = nullptr;      // (B, chunks, C): sums over a chunk's tokens
  float* lows = nullptr;         // minima: (B, chunks, C), or (B, chunks) and behind it (B,)
  float* softmax = nullptr;      // (B, chunks, H, 2): largest logit of the chunk, sum of its exponentials
  unsigned* counters = nullptr;  // zeros: (B + 1) of `statistics`, (B) of `pool`
};

// Mean and inverse deviation of one token, in two passes over it; the second corrects the mean by what the
// first one's rounding left. The whole warp.
template <class X>
__device__ __forceinline__ void token_statistics(const X* row, int channels, float norm_eps, int lane,
                                                 float& mean, float& inverse) {
  float sum = 0.f;
  for (int c = 4 * lane; c < channels; c += 4 * kWarp) {
    const float4 x = to_float4(*reinterpret_cast<const Quad<X>*>(row + c));  // zeros after the last channel
    sum += (x.x + x.y) + (x.z + x.w);
  }
  const float rough = warp_sum(sum) / channels;
  float rest = 0.f, squares = 0.f;
  for (int c = 4 * lane; c < channels; c += 4 * kWarp) {
    const Quad<X> quad = *reinterpret_cast<const Quad<X>*>(row + c);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float off = c + e < channels ? to_float(quad.at[e]) - rough : 0.f;
      rest += off;
      squares += off * off;
    }
  }
  rest = warp_sum(rest) / channels;
  squares = warp_sum(squares) / channels;
  mean = rough + rest;
  inverse = rsqrtf(fmaxf(squares - rest * rest, 0.f) + norm_eps);
}

// grid (B · chunks), block kThreads, dynamic shared memory statistics_bytes.
template <class X, bool Power>
__global__ void __launch_bounds__(kThreads, 4) statistics(Forward p) {
  FASTSSL_DYNAMIC_SHARED(float4, shared);
  constexpr int kWord = 4 / sizeof(X);
  const Shape& s = p.shape;
  const Place at = place_of(s);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int channels = s.channels, pitch = pitch_of(channels, sizeof(X));
  X* const tile = reinterpret_cast<X*>(shared);
  float* const mean = reinterpret_cast<float*>(tile + s.tile * pitch);
  float* const inverse = mean + padded_tile(s.tile);
  const X* const x = static_cast<const X*>(p.x) + at.image * p.strides.image;
  float* const rows = p.rows + at.image * (2 + 2 * s.heads) * s.tokens;
  const int64_t part = at.image * s.chunks + at.chunk;
  float* const sums = p.partial + part * channels;
  float* const lows = p.lows + (p.channel_minimum ? part * channels : part);

  float low_of_thread = FLT_MAX;
  for (int first = at.first; first < at.end; first += s.tile) {
    const int count = min(s.tile, at.end - first);
    __syncthreads();  // the tile before has been read
    load_tile(tile, x + first * p.strides.token, p.strides, count, channels);
    __syncthreads();
    for (int n = warp; n < count; n += kWarps) {
      float m, r;
      token_statistics(tile + n * pitch, channels, p.norm_eps, lane, m, r);
      if (lane == 0) {
        mean[n] = rows[first + n] = m;
        inverse[n] = rows[int64_t{s.tokens} + first + n] = r;
      }
    }
    if (Power) __syncthreads();  // without it nobody reads another warp's statistics
    for (int c = kWord * thread; c < channels; c += kWord * kThreads) {
      float sum[kWord], low[kWord], weight[kWord], bias[kWord];
#pragma unroll
      for (int e = 0; e < kWord; ++e) {
        const int channel = min(c + e, channels - 1);
        sum[e] = 0.f;
        low[e] = FLT_MAX;
        weight[e] = Power ? p.norm_weight.at(channel) : 0.f;
        bias[e] = Power ? p.norm_bias.at(channel) : 0.f;
      }
#pragma unroll 4
      for (int n = 0; n < count; ++n) {
        const Word<X> word = *reinterpret_cast<const Word<X>*>(tile + n * pitch + c);
#pragma unroll
        for (int e = 0; e < kWord; ++e) {
          const float value = to_float(word.at[e]);
          sum[e] += value;
          if (Power) {
            const float x_hat = standardized(value, mean[n], inverse[n]);
            low[e] = fminf(low[e], affine(x_hat, weight[e], bias[e]));
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kWord; ++e) {
        if (c + e >= channels) continue;
        const bool is_first = first == at.first;
        sums[c + e] = sum[e] + (is_first ? 0.f : sums[c + e]);
        if (!Power) continue;
        if (p.channel_minimum) {
          lows[c + e] = is_first ? low[e] : fminf(low[e], lows[c + e]);
        } else {
          low_of_thread = fminf(low_of_thread, low[e]);
        }
      }
    }
  }
  if (Power && !p.channel_minimum) {
    const float low = block_min(low_of_thread);
    if (thread == 0) lows[0] = low;
  }

  if (!last_block(p.counters + at.image, s.chunks)) return;
  const float* const all_sums = p.partial + at.image * s.chunks * channels;
  const float* const all_lows = p.lows + at.image * s.chunks * (p.channel_minimum ? channels : 1);
  for (int c = thread; c < channels; c += kThreads) {
    float sum = 0.f, low = FLT_MAX;
#pragma unroll 4
    for (int j = 0; j < s.chunks; ++j) {
      sum += __ldcg(all_sums + int64_t{j} * channels + c);
      if (Power && p.channel_minimum) low = fminf(low, __ldcg(all_lows + int64_t{j} * channels + c));
    }
    p.vectors[at.image * (3 + s.heads) * channels + c] = sum / s.tokens;
    if (Power && p.channel_minimum) p.minimum[at.image * channels + c] = low;
  }
  if (!Power || p.channel_minimum) return;
  float low = FLT_MAX;
  for (int j = thread; j < s.chunks; j += kThreads) low = fminf(low, __ldcg(all_lows + j));
  low = block_min(low);
  float* const of_images = p.lows + s.images * s.chunks;
  if (thread == 0) of_images[at.image] = low;
  if (!last_block(p.counters + s.images, static_cast<unsigned>(s.images))) return;
  low = FLT_MAX;
  for (int64_t i = thread; i < s.images; i += kThreads) low = fminf(low, __ldcg(of_images + i));
  low = block_min(low);
  if (thread == 0) p.minimum[0] = low;
}

// t of `count` heads from `first` on, in shared memory: scale · u w, minus the mean. All threads call.
__device__ __forceinline__ void load_queries(float* t,  // (count, padded(C))
                                             const Forward& p, int64_t image, int first, int count) {
  const int channels = p.shape.channels, apart = padded(channels);
  const float* const u = p.vectors + (image * (3 + p.shape.heads) + 3 + first) * channels;
  __syncthreads();  // the heads before have been read
  for (int c = threadIdx.x; c < apart; c += kThreads) {
    const float factor = c < channels ? p.scale * p.norm_weight.at(c) : 0.f;
    for (int h = 0; h < count; ++h) {
      t[h * apart + c] = c < channels ? factor * u[int64_t{h} * channels + c] : 0.f;
    }
  }
  __syncthreads();
  for (int h = threadIdx.x / kWarp; h < count; h += kWarps) {
    const int lane = threadIdx.x % kWarp;
    float sum = 0.f;
    for (int c = lane; c < channels; c += kWarp) sum += t[h * apart + c];
    sum = warp_sum(sum) / channels;
    for (int c = lane; c < channels; c += kWarp) t[h * apart + c] -= sum;
  }
  __syncthreads();
}

// What the chunks of an image make together; the image's last block.
template <class X, bool Power>
__device__ __forceinline__ void finish_pooling(const Forward& p, int64_t image, float* top, float* total) {
  const Shape& s = p.shape;
  const int thread = threadIdx.x, channels = s.channels, depth = channels / s.heads;
  const float* const softmax = p.softmax + image * s.chunks * s.heads * 2;
  const float* const sums = p.partial + image * s.chunks * channels;
  for (int h = thread; h < s.heads; h += kThreads) {
    float peak = -FLT_MAX, sum = 0.f;
    for (int j = 0; j < s.chunks; ++j) {
      peak = fmaxf(peak, __ldcg(softmax + (int64_t{j} * s.heads + h) * 2));
    }
    for (int j = 0; j < s.chunks; ++j) {
      const float* const chunk = softmax + (int64_t{j} * s.heads + h) * 2;
      sum += __ldcg(chunk + 1) * expf(__ldcg(chunk) - peak);
    }
    top[h] = peak;
    total[h] = sum;
  }
  __syncthreads();
  const float beta = p.beta.data != nullptr ? p.beta.at(0) : 0.f;
  for (int c = thread; c < channels; c += kThreads) {
    const int h = c / depth;
    float sum = 0.f;
#pragma unroll 4
    for (int j = 0; j < s.chunks; ++j) {
      const float factor = expf(__ldcg(softmax + (int64_t{j} * s.heads + h) * 2) - top[h]);
      sum += factor * __ldcg(sums + int64_t{j} * channels + c);
    }
    const float pooled = sum / total[h];
    p.vectors[(image * (3 + s.heads) + 2) * channels + c] = pooled;
    const float out =
        Power ? powf(pooled, 1.f / p.gamma) + beta : affine(pooled, p.norm_weight.at(c), p.norm_bias.at(c));
    static_cast<X*>(p.out)[image * channels + c] = from_float<X>(out);
  }
  float* const rows = p.rows + image * (2 + 2 * s.heads) * s.tokens;
  X* const attention = static_cast<X*>(p.attention) + image * s.heads * s.tokens;
  for (int h = 0; h < s.heads; ++h) {
    const float* const logits = rows + int64_t{2 + h} * s.tokens;
    float* const kept = rows + int64_t{2 + s.heads + h} * s.tokens;
    for (int n = thread; n < s.tokens; n += kThreads) {
      const float a = expf(__ldcg(logits + n) - top[h]) / total[h];
      kept[n] = a;
      attention[int64_t{h} * s.tokens + n] = from_float<X>(a);
    }
  }
}

// grid (B · chunks), block kThreads, dynamic shared memory pool_bytes.
template <class X, bool Power>
__global__ void __launch_bounds__(kThreads, 3) pool(Forward p) {
  FASTSSL_DYNAMIC_SHARED(float4, shared);
  constexpr int kWord = 4 / sizeof(X);
  const Shape& s = p.shape;
  const Place at = place_of(s);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int channels = s.channels, heads = s.heads, depth = channels / heads;
  const int pitch = pitch_of(channels, sizeof(X)), apart = padded(channels), width = padded_tile(s.tile);
  const int held = heads_held(channels, heads);
  X* const tile = reinterpret_cast<X*>(shared);
  float* const queries = reinterpret_cast<float*>(tile + s.tile * pitch);  // (held, apart)
  float* const weights = queries + held * apart;                           // (H, width): logits, then weights
  float* const mean = weights + heads * width;
  float* const inverse = mean + width;
  float* const top = inverse + width;   // (H): largest logit so far
  float* const total = top + heads;     // (H): sum of exponentials so far
  float* const factor = total + heads;  // (H): what the sums so far are multiplied with
  const X* const x = static_cast<const X*>(p.x) + at.image * p.strides.image;
  float* const rows = p.rows + at.image * (2 + 2 * heads) * s.tokens;
  const int64_t part = at.image * s.chunks + at.chunk;
  float* const sums = p.partial + part * channels;

  for (int h = thread; h < heads; h += kThreads) {
    top[h] = -FLT_MAX;  // finite: a logit of -inf becomes 0, not NaN
    total[h] = 0.f;
  }
  for (int first = at.first; first < at.end; first += s.tile) {
    const int count = min(s.tile, at.end - first);
    __syncthreads();  // the tile before has been read
    load_tile(tile, x + first * p.strides.token, p.strides, count, channels);
    for (int n = thread; n < count; n += kThreads) {
      mean[n] = rows[first + n];
      inverse[n] = rows[int64_t{s.tokens} + first + n];
    }
    for (int h0 = 0; h0 < heads; h0 += held) {
      const int group = min(held, heads - h0);
      if (held < heads || first == at.first) {
        load_queries(queries, p, at.image, h0, group);
      } else {
        __syncthreads();
      }
      for (int n = warp; n < count; n += kWarps) {
        const X* const row = tile + n * pitch;
        const float m = mean[n], r = inverse[n];
        for (int h = 0; h < group; ++h) {
          float dot = 0.f;
          for (int c = 4 * lane; c < channels; c += 4 * kWarp) {
            const float4 v = to_float4(*reinterpret_cast<const Quad<X>*>(row + c));
            const float4 t = *reinterpret_cast<const float4*>(queries + h * apart + c);
            dot += t.x * (v.x - m);
            dot += t.y * (v.y - m);
            dot += t.z * (v.z - m);
            dot += t.w * (v.w - m);
          }
          dot = r * warp_sum(dot);
          if (lane == 0) {
            weights[(h0 + h) * width + n] = dot;
            rows[int64_t{2 + h0 + h} * s.tokens + first + n] = dot;
          }
        }
      }
    }
    __syncthreads();
    for (int h = warp; h < heads; h += kWarps) {
      const float logit = lane < count ? weights[h * width + lane] : -INFINITY;
      const float before = top[h], peak = fmaxf(before, warp_max(logit));
      const float weight = expf(logit - peak);
      const float sum = warp_sum(weight);
      if (lane < count) weights[h * width + lane] = weight;
      __syncwarp();  // `before` and the sum so far have been read
      if (lane == 0) {
        factor[h] = expf(before - peak);
        total[h] = total[h] * factor[h] + sum;
        top[h] = peak;
      }
    }
    __syncthreads();
    for (int c = kWord * thread; c < channels; c += kWord * kThreads) {
      float sum[kWord], weight[kWord], bias[kWord], shift[kWord];
      int head[kWord];
#pragma unroll
      for (int e = 0; e < kWord; ++e) {
        const int channel = min(c + e, channels - 1);
        head[e] = channel / depth;
        sum[e] = first == at.first ? 0.f : sums[channel] * factor[head[e]];
        weight[e] = Power ? p.norm_weight.at(channel) : 0.f;
        bias[e] = Power ? p.norm_bias.at(channel) : 0.f;
        shift[e] = Power ? p.minimum[p.channel_minimum ? at.image * channels + channel : 0] : 0.f;
      }
#pragma unroll 2
      for (int n = 0; n < count; ++n) {
        const Word<X> word = *reinterpret_cast<const Word<X>*>(tile + n * pitch + c);
#pragma unroll
        for (int e = 0; e < kWord; ++e) {
          float value = standardized(to_float(word.at[e]), mean[n], inverse[n]);
          if (Power) {
            value = affine(value, weight[e], bias[e]) - shift[e] + p.eps;
            value *= slope(value, p.gamma - 1.f);
          }
          sum[e] += weights[head[e] * width + n] * value;
        }
      }
#pragma unroll
      for (int e = 0; e < kWord; ++e) {
        if (c + e < channels) sums[c + e] = sum[e];
      }
    }
  }
  float* const softmax = p.softmax + part * heads * 2;
  for (int h = thread; h < heads; h += kThreads) {
    softmax[2 * h] = top[h];
    softmax[2 * h + 1] = total[h];
  }
  if (last_block(p.counters + s.images + 1 + at.image, s.chunks)) {
    finish_pooling<X, Power>(p, at.image, top, total);
  }
}

}  // namespace fastssl::cuda::simpool
