// simpool on the CPU: what its kernels share, and the table of them that simpool.cpp calls. Included once per
// instruction set by foreach_isa.h.
//
// Tokens are worked on in blocks of kBlockTokens, which stay in the first-level cache between two looks at
// them. x̂ = (x − μ) r is a token of mean 0 and variance 1, y = x̂ w + b; y is never in memory.

#include "cpu/token_rows.h"
#include "cpu/small_product.h"

namespace fastssl::cpu::FASTSSL_ISA {

// The one place where y is computed: whether a value is the minimum is decided by equal bits.
template <class T>
FASTSSL_INLINE Vec<T> normalized(Vec<T> x, Vec<T> weight, Vec<T> bias) {
  return x * weight + bias;
}

constexpr int kMean = 0, kSquare = 1, kPower = 2;  // gamma: none, 2, any
// v^(γ−1).
template <class T, int POWER>
FASTSSL_INLINE Vec<T> lower_power(Vec<T> v, T exponent) {
  return POWER == kSquare ? v : exp2(exponent * log2(v));
}

// A minimum, or what belongs to it: one number, or one of each channel.
template <class T>
struct PerChannel {
  const T* data;
  bool vector;
  FASTSSL_INLINE Vec<T> at(int64_t c, int64_t lanes) const {
    return vector ? load_some<T>(data + c, lanes) : broadcast<T>(*data);
  }
};
template <class T>
PerChannel<T> per_channel(const SimPool<T>& op, const T* values, int64_t image) {
  return {values + (op.channel_min ? image * op.channels : 0), op.channel_min};
}

// Tokens of one block, with what is known of each.
template <class T>
struct Block {
  const T* rows;
  int64_t stride, count;
  const T *mean, *inverse;  // μ and r of each

  FASTSSL_INLINE const T* row(int64_t r) const { return rows + r * stride; }
};

template <class T>
T* row_of(const SimPool<T>& op, int64_t image, int64_t which) {
  return op.rows + (image * (2 + 2 * op.heads) + which) * op.tokens;
}
template <class T>
T* vector_of(const SimPool<T>& op, int64_t image, int64_t which) {
  return op.vectors + (image * (3 + op.heads) + which) * op.channels;
}
template <class T>
Block<T> block_of(const SimPool<T>& op, const TokenRows<T>& tokens, int64_t image, int64_t first) {
  Block<T> block;
  block.count = std::min(kBlockTokens, op.tokens - first);
  block.rows = tokens.at(image, first, block.count, block.stride);
  block.mean = row_of(op, image, kRowMean) + first;
  block.inverse = row_of(op, image, kRowInverse) + first;
  return block;
}

// result[r] = Σ_c t_c (x_rc − μ_r) over channels [from, to), of all tokens of a block: four at a time, so
// that each t_c is loaded once for them.
template <class T>
void centred_products(const T* t, const Block<T>& block, int64_t from, int64_t to, T* result) {
  constexpr int W = Simd<T>::kWidth;
  for (int64_t first = 0; first < block.count; first += 4) {
    const T* row[4];
    T mean[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t r = std::min(first + i, block.count - 1);
      row[i] = block.row(r);
      mean[i] = block.mean[r];
    }
    Vec<T> sum[4] = {};
    for_channels<T>(from, to, [&](int64_t c, auto vectors, int64_t lanes) {
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> factor = load_some<T>(t + c + v * W, lanes);
        for (int i = 0; i < 4; ++i)
          sum[i] += factor * (load_some<T>(row[i] + c + v * W, lanes, mean[i]) - mean[i]);
      }
    });
    const int64_t some = std::min<int64_t>(4, block.count - first);
    for (int64_t i = 0; i < some; ++i) result[first + i] = sum_lanes<T>(sum[i]);
  }
}

// sum_c += Σ_r factor_r (x_rc − μ_r) over the tokens of a block, for channels [from, to).
template <class T>
void add_centred(const T* factor, const Block<T>& block, int64_t from, int64_t to, T* sum) {
  constexpr int W = Simd<T>::kWidth;
  for_channels<T>(from, to, [&](int64_t c, auto vectors, int64_t lanes) {
    constexpr int NV = vectors;
    Vec<T> part[NV] = {};
    for (int64_t r = 0; r < block.count; ++r) {
      const T* row = block.row(r) + c;
      const Vec<T> f = broadcast<T>(factor[r]), mean = broadcast<T>(block.mean[r]);
      for (int v = 0; v < NV; ++v) part[v] += f * (load_some<T>(row + v * W, lanes) - mean);
    }
    for (int v = 0; v < NV; ++v)
      store_some<T>(sum + c + v * W, load_some<T>(sum + c + v * W, lanes) + part[v], lanes);
  });
}

// t'_h = scale·u_h∘w less its mean: with x̂ of mean 0 that changes no product, and a mean common to all
// channels of x cannot cancel digits.
template <class T>
void centred_queries(const SimPool<T>& op, int64_t image, T* queries) {
  for (int64_t h = 0; h < op.heads; ++h, queries += op.channels) {
    const T* folded = vector_of(op, image, kVectorFolded + h);
    double sum = 0;
    for (int64_t c = 0; c < op.channels; ++c) {
      queries[c] = op.scale * folded[c] * op.weight[c];
      sum += double{queries[c]};
    }
    const T mean = static_cast<T>(sum / static_cast<double>(op.channels));
    for (int64_t c = 0; c < op.channels; ++c) queries[c] -= mean;
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA

#include "cpu/simpool_forward.h"
#include "cpu/simpool_backward.h"
#include "cpu/simpool_input.h"

namespace fastssl::cpu::FASTSSL_ISA {

template <class T>
SimPoolKernels<T> simpool_kernels(int power) {
  constexpr SmallProductKernels product = small_product_kernels<T>();
  if (power == kMean)
    return {simpool_statistics<T>, simpool_attend<T, kMean>, simpool_tokens<T>, simpool_input<T>, product};
  if (power == kSquare)
    return {simpool_statistics<T>, simpool_attend<T, kSquare>, simpool_power_tokens<T, kSquare>,
            simpool_power_input<T, kSquare>, product};
  return {simpool_statistics<T>, simpool_attend<T, kPower>, simpool_power_tokens<T, kPower>,
          simpool_power_input<T, kPower>, product};
}

}  // namespace fastssl::cpu::FASTSSL_ISA
