// simpool, the end of the backward: the gradient of x from its second reading, and the sums over images that
// are the gradients of the vectors among the parameters. Device code only, no torch headers.
//
// With s1 = Σ_c dy w / C and s2 = Σ_c dy w x̂ / C of a token, LayerNorm's backward is
// dx = inverse (dy w - s1 - x̂ s2); here dy w = (dv + tau [y = minimum]) w + Σ_h dL t, or a P + Σ_h dL t
// without a power. Without one nothing is left to sum over channels: the kernel only reads and writes. With
// one, the ties' share of s1 and s2 is, since tau was not known in the first reading.
#pragma once

#include "simpool_backward.cuh"

namespace fastssl::cuda::simpool {

constexpr int kTokensHeld = 4;  // tokens of a channel that a thread works on at a time

// grid (B · chunks), block kThreads, dynamic shared memory input_gradients_bytes. The tile becomes the
// gradient, in place: each element is read and written by one thread.
//
// In float32 with a power a thread has a few numbers more than three blocks' share of registers holds.
template <class X, bool Power>
__global__ void __launch_bounds__(kThreads, Power && sizeof(X) == 4 ? 2 : 3) input_gradients(Backward p) {
  FASTSSL_DYNAMIC_SHARED(float4, shared);
  constexpr int kWord = 4 / sizeof(X);
  const Shape& s = p.shape;
  const Place at = place_of(s);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int channels = s.channels, heads = s.heads, depth = channels / heads;
  const int pitch = pitch_of(channels, sizeof(X)), apart = padded(channels), width = padded_tile(s.tile);
  X* const tile = reinterpret_cast<X*>(shared);
  float* const weight = reinterpret_cast<float*>(tile + s.tile * pitch);  // these four with a power only
  float* const bias = weight + apart;
  float* const low = bias + apart;
  float* const tau = low + apart;                           // times w
  float* const dlogits = weight + (Power ? 4 : 0) * apart;  // (H, width)
  float* const attention = dlogits + heads * width;         // (H, width)
  float* const mean = attention + heads * width;
  float* const inverse = mean + width;
  float* const shift = inverse + width;  // s1
  float* const stretch = shift + width;  // s2
  const X* const x = static_cast<const X*>(p.x) + at.image * p.strides.image;
  X* const grad_x = static_cast<X*>(p.grad_x) + at.image * p.grad_strides.image;
  const float* const rows = p.rows + at.image * (2 + 2 * heads) * s.tokens;
  const float* const tokens = p.tokens + at.image * (2 + heads) * s.tokens;

  if (Power) {
    for (int c = thread; c < apart; c += kThreads) {
      const bool inside = c < channels;
      weight[c] = inside ? p.norm_weight.at(c) : 0.f;
      bias[c] = inside ? p.norm_bias.at(c) : 0.f;
      low[c] = inside ? minimum_of(p, at.image, c) : 0.f;
      tau[c] = inside ? tau_of(p, at.image, c) * weight[c] : 0.f;
    }
  }
  for (int first = at.first; first < at.end; first += s.tile) {
    const int count = min(s.tile, at.end - first);
    __syncthreads();  // the tile before has been stored
    load_tile(tile, x + first * p.strides.token, p.strides, count, channels);
    for (int i = thread; i < heads * width; i += kThreads) {
      const int h = i / width, n = i % width;
      const bool inside = n < count;
      dlogits[i] = inside ? tokens[int64_t{2 + h} * s.tokens + first + n] : 0.f;
      attention[i] = inside ? rows[int64_t{2 + heads + h} * s.tokens + first + n] : 0.f;
    }
    for (int n = thread; n < count; n += kThreads) {
      mean[n] = rows[first + n];
      inverse[n] = rows[int64_t{s.tokens} + first + n];
      shift[n] = tokens[first + n];
      stretch[n] = tokens[int64_t{s.tokens} + first + n];
    }
    __syncthreads();
    if (Power) {
      for (int n = warp; n < count; n += kWarps) {
        const X* const row = tile + n * pitch;
        float of_ties = 0.f, of_ties_stretch = 0.f;
        for_channels<true>(row, 0, channels, lane, [&](int c, const float4& v) {
          const float4 w = *reinterpret_cast<const float4*>(weight + c);
          const float4 b = *reinterpret_cast<const float4*>(bias + c);
          const float4 l = *reinterpret_cast<const float4*>(low + c);
          const float4 t = *reinterpret_cast<const float4*>(tau + c);
          const auto add = [&](float value, float w_c, float b_c, float low_c, float tau_c) {
            const float x_hat = standardized(value, mean[n], inverse[n]);
            const float share = affine(x_hat, w_c, b_c) == low_c ? tau_c : 0.f;
            of_ties += share;
            of_ties_stretch += share * x_hat;
          };
          add(v.x, w.x, b.x, l.x, t.x);
          add(v.y, w.y, b.y, l.y, t.y);
          add(v.z, w.z, b.z, l.z, t.z);
          add(v.w, w.w, b.w, l.w, t.w);
        });
        of_ties = warp_sum(of_ties) / channels;
        of_ties_stretch = warp_sum(of_ties_stretch) / channels;
        if (lane == 0) {
          shift[n] += of_ties;
          stretch[n] += of_ties_stretch;
        }
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int c = kWord * thread; c < channels; c += kWord * kThreads) {
      float factor[kWord], of_mean[kWord];
      int channel[kWord], head[kWord];
#pragma unroll
      for (int e = 0; e < kWord; ++e) {
        channel[e] = min(c + e, channels - 1);
        head[e] = channel[e] / depth;
        factor[e] = upstream_of_pooled<X, Power>(p, at.image, channel[e]);
        of_mean[e] = p.dmean[at.image * channels + channel[e]] / s.tokens;
      }
      const float* const t = p.t + at.image * heads * channels;
#pragma unroll 1
      for (int n0 = 0; n0 < count; n0 += kTokensHeld) {
        float sum[kTokensHeld][kWord] = {};  // Σ_h dL t
#pragma unroll 1
        for (int h = 0; h < heads; ++h) {
          const float* const dlogit = dlogits + h * width + n0;
          float t_h[kWord];
#pragma unroll
          for (int e = 0; e < kWord; ++e) t_h[e] = t[int64_t{h} * channels + channel[e]];
#pragma unroll
          for (int k = 0; k < kTokensHeld; ++k) {
#pragma unroll
            for (int e = 0; e < kWord; ++e) sum[k][e] += dlogit[k] * t_h[e];
          }
        }
#pragma unroll
        for (int k = 0; k < kTokensHeld; ++k) {
          const int n = n0 + k;
          if (n >= count) break;
          Word<X>* const word = reinterpret_cast<Word<X>*>(tile + n * pitch + c);
          Word<X> made;
#pragma unroll
          for (int e = 0; e < kWord; ++e) {
            const float x_hat = standardized(to_float(word->at[e]), mean[n], inverse[n]);
            float dyw = attention[head[e] * width + n] * factor[e];
            if (Power) {
              const float y = affine(x_hat, weight[c + e], bias[c + e]);
              dyw *= slope(y - low[c + e] + p.eps, p.gamma - 1.f) * weight[c + e];
              dyw += y == low[c + e] ? tau[c + e] : 0.f;
            }
            dyw += sum[k][e];
            made.at[e] = from_float<X>(inverse[n] * (dyw - shift[n] - x_hat * stretch[n]) + of_mean[e]);
          }
          *word = made;
        }
      }
    }
    __syncthreads();
    store_tile(tile, grad_x + first * p.grad_strides.token, p.grad_strides, count, channels);
  }
}

// grid (C / kColumns, rounded up), block kThreads. A warp takes every eighth image, a lane a channel.
template <class X, bool Power>
__global__ void __launch_bounds__(kThreads) parameter_gradients(Backward p) {
  FASTSSL_SHARED(float, parts, kWarps * 4 * kWarp);
  const Shape& s = p.shape;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int channel = blockIdx.x * kColumns + lane;
  const bool inside = channel < s.channels;
  float weight = 0.f, bias = 0.f, query = 0.f, grad = 0.f;
  if (inside) {
#pragma unroll 2
    for (int64_t i = warp; i < s.images; i += kWarps) {
      const float* const sums = p.images + i * image_sums(Power) * s.channels + channel;
      const float g = upstream<X>(p, i, channel);
      grad += g;
      query += p.dq[i * s.channels + channel];
      if (Power) {
        const float tau = tau_of(p, i, channel);
        weight += sums[0] + tau * sums[int64_t{2} * s.channels];
        bias += sums[s.channels] + tau * sums[int64_t{3} * s.channels];
      } else {
        weight += sums[0];
        bias += g;
      }
    }
  }
  const float mine[4] = {weight, bias, query, grad};
#pragma unroll
  for (int k = 0; k < 4; ++k) parts[(warp * 4 + k) * kWarp + lane] = mine[k];
  __syncthreads();
  float total[4] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
#pragma unroll
    for (int k = 0; k < 4; ++k) total[k] += parts[(w * 4 + k) * kWarp + lane];
  }
  if (warp == 0 && inside) {
    p.grad_norm_weight.put(channel, total[0]);
    p.grad_norm_bias.put(channel, total[1]);
    if (p.grad_bq.data != nullptr) p.grad_bq.put(channel, total[2]);
  }
  if (p.grad_beta.data == nullptr) return;
  const float of_block = warp_sum(total[3]);
  if (threadIdx.x == 0) p.beta[blockIdx.x] = of_block;
  if (!last_block(p.counters + s.images + 1, gridDim.x)) return;
  float sum = 0.f;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kThreads) sum += __ldcg(p.beta + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.grad_beta.put(0, sum);
}

}  // namespace fastssl::cuda::simpool
