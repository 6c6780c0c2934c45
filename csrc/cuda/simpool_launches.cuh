// simpool's launches, in order, and the workspace between them. No torch headers: simpool.cu gives a launcher
// for a stream, tests/cuda_simpool.cpp one that runs the kernels on the CPU.
//
// Forward, reading x twice: counters to zero; statistics -> rows, mean token, minimum; the products
// q = Wq mean + bq and u_h = Wk_hᵀ q_h; pool -> out, attention.
// Backward, reading x twice: counters to zero; token_gradients -> dL, du, shares of the vectors; the products
// dq_h = Wk_h du_h and dWk_h = q_h duᵀ together, then dmean = Wqᵀ dq and dWq = dqᵀ mean together;
// parameter_gradients; input_gradients.
//
// A workspace has `take(count)`, in floats; a launcher has `zero(pointer, bytes)` and `run(name, kernel,
// blocks, threads, shared_bytes, argument)`.
#pragma once

#include "simpool.cuh"
#include "simpool_gradients.cuh"
#include "small_products.cuh"

namespace fastssl::cuda::simpool {

// A weight matrix, by strides in elements.
struct Matrix {
  void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t row = 0, column = 0;
};

// Hands out parts of a workspace, or only adds up how much they take where there is none yet.
struct Workspace {
  float* base = nullptr;
  int64_t used = 0;
  float* take(int64_t count) {
    float* const part = base == nullptr ? nullptr : base + used;
    used += (count + 3) / 4 * 4;
    return part;
  }
};

inline int64_t forward_counters(const Shape& s) { return 2 * s.images + 1; }
inline int64_t backward_counters(const Shape& s) { return s.images + 2; }

template <class Space>
void lay_out(Space& space, Forward& p, bool power) {
  const Shape& s = p.shape;
  const int64_t parts = s.images * s.chunks;
  p.partial = space.take(parts * s.channels);
  p.lows = space.take(!power ? 0 : p.channel_minimum ? parts * s.channels : parts + s.images);
  p.softmax = space.take(parts * s.heads * 2);
  p.counters = reinterpret_cast<unsigned*>(space.take(forward_counters(s)));
}

template <class Space>
void lay_out(Space& space, Backward& p, bool power) {
  const Shape& s = p.shape;
  const int64_t vectors = s.images * s.channels;
  p.partial = space.take(vectors * s.chunks * token_sums(s.heads, power));
  p.tokens = space.take(s.images * (2 + s.heads) * s.tokens);
  p.du = space.take(vectors * s.heads);
  p.t = space.take(vectors * s.heads);
  p.images = space.take(vectors * image_sums(power));
  p.ties = space.take(2 * s.images + 1);
  p.dq = space.take(vectors);
  p.dmean = space.take(vectors);
  p.beta = space.take((s.channels + kColumns - 1) / kColumns);
  p.counters = reinterpret_cast<unsigned*>(space.take(backward_counters(s)));
}

inline products::Operand operand(const float* data, int64_t batch, int64_t row, int64_t column) {
  return {data, Storage::float32, batch, row, column};
}
inline products::Result result(float* data, int64_t batch, int64_t row, int64_t column) {
  return {data, Storage::float32, batch, row, column};
}

template <class Launcher>
void multiply(Launcher& launcher, const char* name, const products::Product& first,
              const products::Product& second = {}) {
  const products::Pair pair{first, second};
  const int64_t blocks = products::blocks_of(first) + products::blocks_of(second);
  launcher.run(name, products::multiply, blocks, products::kThreads, 0, pair);
}

template <class X, bool Power, class Launcher>
void run_forward(Launcher& launcher, const Forward& p, const Matrix& wq, const Matrix& wk, const Values& bq) {
  const Shape& s = p.shape;
  const int64_t blocks = s.images * s.chunks, row = int64_t{3 + s.heads} * s.channels;
  const int images = static_cast<int>(s.images), channels = s.channels, depth = channels / s.heads;
  launcher.zero(p.counters, sizeof(unsigned) * forward_counters(s));
  launcher.run("statistics", statistics<X, Power>, blocks, kThreads,
               statistics_bytes(s.tile, channels, sizeof(X)), p);
  float *const mean = p.vectors, *const q = p.vectors + channels, *const u = p.vectors + 3 * channels;
  multiply(launcher, "query",
           {images,
            channels,
            channels,
            1,
            operand(mean, 0, row, 1),
            {wq.data, wq.storage, 0, wq.column, wq.row},
            {bq.data, bq.storage, 0, 0, bq.stride},
            result(q, 0, row, 1)});
  multiply(launcher, "folded query",
           {images,
            channels,
            depth,
            s.heads,
            operand(q, depth, row, 1),
            {wk.data, wk.storage, depth * wk.row, wk.row, wk.column},
            {},
            result(u, channels, row, 1)});
  launcher.run("pool", pool<X, Power>, blocks, kThreads, pool_bytes(s.tile, channels, s.heads, sizeof(X)), p);
}

// wanted: 1 the gradient of x, 2 those of the parameters.
template <class X, bool Power, class Launcher>
void run_backward(Launcher& launcher, const Backward& p, const Matrix& wq, const Matrix& wk,
                  const Matrix& grad_wq, const Matrix& grad_wk, bool wants_x, bool wants_parameters) {
  const Shape& s = p.shape;
  const int64_t blocks = s.images * s.chunks, row = int64_t{3 + s.heads} * s.channels;
  const int images = static_cast<int>(s.images), channels = s.channels, heads = s.heads;
  const int64_t depth = channels / heads, du_row = int64_t{heads} * channels;
  launcher.zero(p.counters, sizeof(unsigned) * backward_counters(s));
  launcher.run("token_gradients", token_gradients<X, Power>, blocks, kThreads,
               token_gradients_bytes(s.tile, channels, heads, sizeof(X), Power), p);
  const float *const mean = p.vectors, *const q = p.vectors + channels;
  products::Product dq{images,
                       static_cast<int>(depth),
                       channels,
                       heads,
                       operand(p.du, channels, du_row, 1),
                       {wk.data, wk.storage, depth * wk.row, wk.column, wk.row},
                       {},
                       result(p.dq, depth, channels, 1)};
  products::Product dwk, dmean, dwq;
  if (wants_parameters) {
    dwk = {static_cast<int>(depth),
           channels,
           images,
           heads,
           operand(q, depth, 1, row),
           operand(p.du, channels, du_row, 1),
           {},
           {grad_wk.data, grad_wk.storage, depth * grad_wk.row, grad_wk.row, grad_wk.column}};
    dwq = {channels,
           channels,
           images,
           1,
           operand(p.dq, 0, 1, channels),
           operand(mean, 0, row, 1),
           {},
           {grad_wq.data, grad_wq.storage, 0, grad_wq.row, grad_wq.column}};
  }
  if (wants_x) {
    dmean = {images,
             channels,
             channels,
             1,
             operand(p.dq, 0, channels, 1),
             {wq.data, wq.storage, 0, wq.row, wq.column},
             {},
             result(p.dmean, 0, channels, 1)};
  }
  multiply(launcher, "gradients behind the folded query", dq, dwk);
  multiply(launcher, "gradients behind the query", dmean, dwq);
  if (wants_parameters) {
    launcher.run("parameter_gradients", parameter_gradients<X, Power>, (channels + kColumns - 1) / kColumns,
                 kThreads, 0, p);
  }
  if (wants_x) {
    launcher.run("input_gradients", input_gradients<X, Power>, blocks, kThreads,
                 input_gradients_bytes(s.tile, channels, heads, sizeof(X), Power), p);
  }
}

// Calls f(X{}, power) for the storage type and whether there is a power, both as types.
template <bool Power>
struct PowerTag {
  static constexpr bool value = Power;
};
template <class X, class F>
void with_power(bool power, const F& f) {
  if (power) {
    f(X{}, PowerTag<true>{});
  } else {
    f(X{}, PowerTag<false>{});
  }
}
template <class F>
void with_types(Storage storage, bool power, const F& f) {
  if (storage == Storage::float32) with_power<float>(power, f);
  if (storage == Storage::bfloat16) with_power<__nv_bfloat16>(power, f);
  if (storage == Storage::float16) with_power<__half>(power, f);
}

}  // namespace fastssl::cuda::simpool
