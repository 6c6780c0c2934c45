// sample_tokens' forward on the CPU: out_p = Σ_k weight_k · token_k over the four tokens around each point.
// Included by sample_tokens.h, once per instruction set.

namespace fastssl::cpu::FASTSSL_ISA {

template <class S>
int64_t sample_forward_block(const SampleTokens& op) {
  return is_packed(op) ? Simd<Sum<S>>::kWidth : balanced_block<Sum<S>>(op.channels);
}
template <class S>
int64_t sample_forward_blocks(const SampleTokens& op) {
  return ceil_div(op.channels, sample_forward_block<S>(op));
}

template <class T, bool UNIT, class E>
FASTSSL_INLINE Vec<T> blended(const Tokens<E>& tokens, const Vec<T>* weight, int64_t channel, int64_t count) {
  Vec<T> sum = weight[0] * tokens.template load<T, UNIT>(0, channel, count);
#pragma GCC unroll 3
  for (int k = 1; k < 4; ++k) sum += weight[k] * tokens.template load<T, UNIT>(k, channel, count);
  return sum;
}

// All points of one image, `channels` channels of them. A token outside the map is multiplied too, as a zero:
// a coordinate that is not finite has NaN weights, and the result is NaN.
template <bool UNIT, class T, class E, class S>
void blend_points(const Cell<T>* cells, int64_t points, const Map<E>& map, const E* zeros, int64_t channels,
                  S* out, int64_t out_stride) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t whole = channels / W * W;
  for (int64_t p = 0; p < points; ++p, out += out_stride) {
    const Tokens<E> tokens(map, cells[p], zeros);
    Vec<T> weight[4];
    for (int k = 0; k < 4; ++k) weight[k] = broadcast<T>(cells[p].weight[k]);
    for (int64_t c = 0; c < whole; c += W) store_any<T>(out + c, blended<T, UNIT>(tokens, weight, c, W));
    if (whole < channels) {
      const int64_t rest = channels - whole;
      store_part<T>(out + whole, blended<T, UNIT>(tokens, weight, whole, rest), rest);
    }
  }
}

template <class S>
void sample_forward(const SampleTokens& op, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int W = Simd<T>::kWidth;
  const int64_t block = sample_forward_block<S>(op), blocks = sample_forward_blocks<S>(op);
  const int64_t packed_size = is_packed(op) ? (op.height * op.width + 1) * W : 0;
  Scratch scratch(Scratch::bytes_of<Cell<T>>(op.points) + Scratch::bytes_of<T>(block) +
                  Scratch::bytes_of<T>(packed_size));
  Cell<T>* cells = scratch.take<Cell<T>>(op.points);
  T* zeros = scratch.take<T>(block);
  T* packed = scratch.take<T>(packed_size);
  std::memset(zeros, 0, static_cast<size_t>(block) * sizeof(T));
  int64_t located = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / blocks, channel = item % blocks * block;
    const int64_t count = std::min(block, op.channels - channel);
    if (image != located) locate<T>(op, image, cells);
    located = image;
    S* out = static_cast<S*>(op.out) + image * op.points * op.channels + channel;
    const Map<S> map = map_of<S>(op, image, channel);
    const S* nothing = reinterpret_cast<const S*>(zeros);  // zero has the same bits in every type
    if (is_packed(op)) {
      pack_map<T>(map.data, op.x, op.height, op.width, count, packed);
      blend_points<true>(cells, op.points, packed_map<T>(op, packed), zeros, count, out, op.channels);
    } else if (is_unit(op.x.channel_stride, op.channels)) {
      blend_points<true>(cells, op.points, map, nothing, count, out, op.channels);
    } else {
      blend_points<false>(cells, op.points, map, nothing, count, out, op.channels);
    }
  }
}

}  // namespace fastssl::cpu::FASTSSL_ISA
