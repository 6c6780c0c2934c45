// simpool on the CPU: registration, checks of what the raw operators are given, and the order of the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>
#include <vector>

#include "cpu/common.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace fastssl::cpu {

// What `rows` (B, 2 + 2H, N), `vectors` (B, 3 + H, C) and the tokens' gradients (B, 2 + H, N) hold.
constexpr int64_t kRowMean = 0, kRowInverse = 1, kRowLogits = 2;  // H of logits, then H of attention
constexpr int64_t kVectorMean = 0, kVectorQuery = 1, kVectorPooled = 2,
                  kVectorFolded = 3;  // H of folded queries
constexpr int64_t kTokenS1 = 0, kTokenS2 = 1, kTokenLogits = 2;

// One call; arrays are contiguous.
template <class T>
struct SimPool {
  Strided x;  // (B, N, C)
  int64_t batch = 0, tokens = 0, channels = 0, heads = 0;
  int power = 0;
  bool channel_min = false;
  T scale = 0, gamma = 0, eps = 0, norm_eps = 0, beta = 0;
  const T *weight = nullptr, *bias = nullptr;  // of the LayerNorm
  T *rows = nullptr, *vectors = nullptr;
  T* minimum = nullptr;  // of y: of the batch, or (B, C)
  T* minima = nullptr;   // (B,), of each image, where the batch's is wanted
  T* out = nullptr;      // (B, C)
  // Backward alone.
  const T *grad = nullptr, *grad_attention = nullptr;  // (B, C), (B, H, N) or null
  T* token_gradients = nullptr;                        // (B, 2 + H, N): s1, s2, dL
  T* logit_sums = nullptr;                             // (B, H, C): Σ_n dL_hn x̂_n
  T* power_sums = nullptr;            // (B, 4, C): Σ dv, Σ dv x̂, ties of the minimum, Σ x̂ of these
  const T* tie_gradients = nullptr;   // of the minimum, for each of its ties: one, or (B, C)
  const T* mean_gradients = nullptr;  // (B, C), of the mean token
  Strided grad_x;
};

// out = a b, of a batch of small matrices.
struct SmallProduct {
  Strided a, b, out;  // (rows, inner), (inner, columns), (rows, columns)
  int64_t batch = 0, rows = 0, inner = 0, columns = 0;
};
struct SmallProductKernels {
  void (*run)(const SmallProduct&, int64_t begin, int64_t end);
  int64_t columns;  // of an item
};

template <class T>
struct SimPoolKernels {
  using Images = void (*)(const SimPool<T>&, int64_t begin, int64_t end);
  Images statistics, attend, tokens, input;
  SmallProductKernels product;
};

}  // namespace fastssl::cpu

#define FASTSSL_KERNEL "cpu/simpool.h"
#include "cpu/foreach_isa.h"
#include "cpu/numbers.h"

namespace fastssl::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Images whose second look should find them in the last-level cache: groups of about this many bytes.
constexpr int64_t kGroupBytes = int64_t{8} << 20;

// The tensors of a call, and the numbers of it, as the raw operators get them.
struct Arguments {
  const Tensor &x, &wq, &bq, &wk, &norm_weight, &norm_bias, &beta;
  int64_t num_heads;
  double scale, gamma;
  int64_t channel_min;
  double eps, norm_eps;

  bool in_double() const {
    for (const Tensor* t : {&x, &wq, &bq, &wk, &norm_weight, &norm_bias, &beta})
      if (t->scalar_type() == ScalarType::Double) return true;
    return false;
  }
  ScalarType work() const { return in_double() ? ScalarType::Double : ScalarType::Float; }
  void check() const {
    const int64_t channels = x.dim() == 3 ? x.size(2) : 0;
    STD_TORCH_CHECK(channels > 0 && x.size(1) > 0, "simpool: x must be (B, N, C) with a token and a channel");
    for (const Tensor* t : {&wq, &wk})
      STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == channels && t->size(1) == channels,
                      "simpool: wq and wk must be (C, C)");
    for (const Tensor* t : {&norm_weight, &norm_bias})
      STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels,
                      "simpool: norm_weight and norm_bias must be (C,)");
    STD_TORCH_CHECK(bq.numel() == 0 || bq.numel() == channels, "simpool: bq must be (C,) or empty");
    STD_TORCH_CHECK(beta.numel() <= 1, "simpool: beta must have one element or none");
    STD_TORCH_CHECK(num_heads > 0 && channels % num_heads == 0, "simpool: num_heads must divide C");
  }
};

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
SimPool<T> describe(const Arguments& a, const std::vector<T>& weight, const std::vector<T>& bias) {
  SimPool<T> op;
  op.x = heads_of(a.x, false, 1);
  op.batch = a.x.size(0);
  op.tokens = a.x.size(1);
  op.channels = a.x.size(2);
  op.heads = a.num_heads;
  op.power = a.gamma == 0 ? 0 : a.gamma == 2 ? 1 : 2;
  op.channel_min = a.channel_min != 0;
  op.scale = static_cast<T>(a.scale);
  op.gamma = static_cast<T>(a.gamma);
  op.eps = static_cast<T>(a.eps);
  op.norm_eps = static_cast<T>(a.norm_eps);
  op.weight = weight.data();
  op.bias = bias.data();
  return op;
}

// How many images make a group: at least one for each thread, all of them where one result needs all.
template <class T>
int64_t group_of(const SimPool<T>& op, bool whole) {
  if (whole) return std::max<int64_t>(op.batch, 1);
  const int64_t bytes = op.tokens * op.channels * static_cast<int64_t>(sizeof(T));
  return std::max<int64_t>(torch::stable::get_num_threads(), kGroupBytes / bytes);
}

template <class T>
void run_images(const SimPool<T>& op, typename SimPoolKernels<T>::Images kernel, int64_t begin, int64_t end) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { kernel(op, from, to); });
}
void run_product(const SmallProductKernels& kernels, const SmallProduct& op) {
  torch::stable::parallel_for(0, op.batch * ceil_div(op.columns, kernels.columns), 1,
                              [&](int64_t from, int64_t to) { kernels.run(op, from, to); });
}
// A matrix among others in an array of T: `batch`, `row` and `column` are the strides.
template <class T>
Strided array(const T* data, int64_t batch, int64_t row, int64_t column) {
  return {const_cast<T*>(data), sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat, batch, 0, row, column};
}
// One head after the other of a weight (C, C), as it lies or transposed.
Strided weight_of(const Tensor& w, int64_t depth, bool transposed) {
  const int64_t row = w.stride(0), column = w.stride(1);
  return {w.data_ptr(), dtype_of(w), depth * row, 0, transposed ? column : row, transposed ? row : column};
}

// q = Wq mean + bq, u_h = Wk_hᵀ q_h of images [begin, end).
template <class T>
void run_queries(const SimPool<T>& op, const SimPoolKernels<T>& kernels, const Arguments& a,
                 const std::vector<T>& query_bias, int64_t begin, int64_t end) {
  const int64_t C = op.channels, depth = C / op.heads, step = (3 + op.heads) * C, images = end - begin;
  T* first = op.vectors + begin * step;
  T* query = first + kVectorQuery * C;
  run_product(kernels.product, {array(first + kVectorMean * C, 0, step, 1), weight_of(a.wq, 0, true),
                                array(query, 0, step, 1), 1, images, C, C});
  for (int64_t image = 0; image < images && !query_bias.empty(); ++image)
    for (int64_t c = 0; c < C; ++c) query[image * step + c] += query_bias[c];
  run_product(kernels.product, {array(query, depth, step, 1), weight_of(a.wk, depth, false),
                                array(first + kVectorFolded * C, C, step, 1), op.heads, images, depth, C});
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Results forward_as(const Arguments& a) {
  a.check();
  const std::vector<T> weight = numbers_of<T>(a.norm_weight), bias = numbers_of<T>(a.norm_bias);
  const std::vector<T> query_bias = numbers_of<T>(a.bq);
  SimPool<T> op = describe(a, weight, bias);
  const int64_t B = op.batch, H = op.heads, N = op.tokens, C = op.channels;
  Tensor out = torch::stable::new_empty(a.x, {B, C});
  Tensor attention = torch::stable::new_empty(a.x, {B, H, N});
  Tensor rows = torch::stable::new_empty(a.x, {B, 2 + 2 * H, N}, a.work());
  Tensor vectors = torch::stable::new_empty(a.x, {B, 3 + H, C}, a.work());
  Tensor minimum = op.channel_min ? torch::stable::new_empty(a.x, {B, C}, a.work())
                                  : torch::stable::new_empty(a.x, {op.power == 0 ? 0 : 1}, a.work());
  if (a.beta.numel() == 1) op.beta = numbers_of<T>(a.beta)[0];
  op.rows = data_of<T>(rows);
  op.vectors = data_of<T>(vectors);
  op.minimum = data_of<T>(minimum);
  const bool of_batch = op.power != 0 && !op.channel_min;
  std::vector<T> minima(of_batch ? B : 0), pooled(B * C);
  op.minima = minima.data();
  op.out = pooled.data();
  const SimPoolKernels<T> kernels = FASTSSL_FOR_ISA(simpool_kernels<T>(op.power));
  // The minimum of a batch needs all of it.
  const int64_t group = group_of(op, of_batch);
  for (int64_t begin = 0; begin < B; begin += group) {
    const int64_t end = std::min(B, begin + group);
    run_images(op, kernels.statistics, begin, end);
    if (of_batch) *op.minimum = *std::min_element(minima.begin(), minima.end());
    run_queries(op, kernels, a, query_bias, begin, end);
    run_images(op, kernels.attend, begin, end);
  }
  if (B == 0 && of_batch) *op.minimum = T{0};
  write_numbers(pooled.data(), out);
  for (int64_t image = 0; image < B; ++image)
    write_numbers(op.rows + (image * (2 + 2 * H) + kRowLogits + H) * N, attention, image * H * N, H * N);
  return {out, attention, rows, vectors, minimum};
}

// Gradients of the parameters from what the tokens left behind, all of them sums over the images.
template <class T>
void parameter_gradients(const SimPool<T>& op, const SimPoolKernels<T>& kernels, const std::vector<T>& ties,
                         const std::vector<T>& query_gradients, const std::vector<T>& key_gradients,
                         const std::vector<Tensor>& results) {
  const int64_t B = op.batch, H = op.heads, C = op.channels, depth = C / H, step = (3 + H) * C;
  const auto& [wq, bq, wk, norm_weight, norm_bias, beta] =
      std::tie(results[0], results[1], results[2], results[3], results[4], results[5]);
  // dWq = Σ_b dq_b ⊗ mean_b, dWk_h = Σ_b q_bh ⊗ du_bh.
  run_product(kernels.product,
              {array(query_gradients.data(), 0, 1, C), array(op.vectors + kVectorMean * C, 0, step, 1),
               weight_of(wq, 0, false), 1, C, B, C});
  run_product(kernels.product,
              {array(op.vectors + kVectorQuery * C, depth, 1, step), array(key_gradients.data(), C, H * C, 1),
               weight_of(wk, depth, false), H, depth, B, C});
  std::vector<double> query(C), weight(C), bias(C);
  double sum = 0;
  for (int64_t b = 0; b < B; ++b) {
    const T *vectors = op.vectors + b * step, *grad = op.grad + b * C;
    for (int64_t c = 0; c < C; ++c) query[c] += double{query_gradients[b * C + c]};
    for (int64_t h = 0; h < H; ++h) {
      const T *folded = vectors + (kVectorFolded + h) * C, *sums = op.logit_sums + (b * H + h) * C;
      for (int64_t c = 0; c < C; ++c) weight[c] += double{op.scale * folded[c] * sums[c]};
    }
    if (op.power == 0) {
      for (int64_t c = 0; c < C; ++c) {
        weight[c] += double{grad[c] * vectors[kVectorPooled * C + c]};
        bias[c] += double{grad[c]};
      }
    } else {
      const T* powers = op.power_sums + b * 4 * C;
      for (int64_t c = 0; c < C; ++c) {
        const T tie = ties[op.channel_min ? b * C + c : 0];
        weight[c] += double{powers[C + c] + tie * powers[3 * C + c]};
        bias[c] += double{powers[c] + tie * powers[2 * C + c]};
        sum += double{grad[c]};
      }
    }
  }
  if (bq.numel() > 0) write_numbers(query.data(), bq);
  write_numbers(weight.data(), norm_weight);
  write_numbers(bias.data(), norm_bias);
  if (beta.numel() > 0) write_numbers(&sum, beta);
}

// The gradient of each tie of the minimum: what flows to the minimum, −Σ dv, shared evenly.
template <class T>
std::vector<T> gradients_of_ties(const SimPool<T>& op) {
  const int64_t B = op.batch, C = op.channels;
  std::vector<T> ties(op.power == 0 ? 0 : op.channel_min ? B * C : 1);
  double sum = 0, count = 0;
  for (int64_t b = 0; b < B && op.power != 0; ++b) {
    const T* sums = op.power_sums + b * 4 * C;
    for (int64_t c = 0; c < C; ++c) {
      if (op.channel_min) ties[b * C + c] = -sums[c] / std::max(sums[2 * C + c], T{1});
      sum += double{sums[c]};
      count += double{sums[2 * C + c]};
    }
  }
  if (op.power != 0 && !op.channel_min) ties[0] = static_cast<T>(-sum / std::max(count, 1.0));
  return ties;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients backward_as(const Arguments& a, const Tensor& grad, const Tensor& grad_attention,
                      const Tensor& rows, const Tensor& vectors, const Tensor& minimum, int64_t wanted) {
  a.check();
  const std::vector<T> weight = numbers_of<T>(a.norm_weight), bias = numbers_of<T>(a.norm_bias);
  SimPool<T> op = describe(a, weight, bias);
  const int64_t B = op.batch, H = op.heads, N = op.tokens, C = op.channels, depth = C / H, step = (3 + H) * C;
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == B && grad.size(1) == C, "simpool: grad must be (B, C)");
  const bool with_attention = grad_attention.numel() > 0;
  STD_TORCH_CHECK(!with_attention || (grad_attention.dim() == 3 && grad_attention.numel() == B * H * N),
                  "simpool: grad_attention must be (B, H, N) or empty");
  STD_TORCH_CHECK(rows.is_contiguous() && vectors.is_contiguous() && minimum.is_contiguous() &&
                      rows.scalar_type() == a.work() && rows.numel() == B * (2 + 2 * H) * N &&
                      vectors.scalar_type() == a.work() && vectors.numel() == B * step &&
                      minimum.scalar_type() == a.work() &&
                      minimum.numel() == (op.channel_min  ? B * C
                                          : op.power == 0 ? 0
                                                          : 1),
                  "simpool: rows, vectors and minimum must be those of the forward call");
  const bool wants_x = wanted & 1, wants_parameters = wanted & 2;
  Tensor grad_x = wants_x ? torch::stable::empty_like(a.x) : torch::stable::new_empty(a.x, {0});
  std::vector<Tensor> results;
  for (const Tensor* p : {&a.wq, &a.bq, &a.wk, &a.norm_weight, &a.norm_bias, &a.beta})
    results.push_back(wants_parameters ? torch::stable::empty_like(*p) : torch::stable::new_empty(*p, {0}));
  const std::vector<T> upstream = numbers_of<T>(grad);
  const std::vector<T> attention = with_attention ? numbers_of<T>(grad_attention) : std::vector<T>();
  std::vector<T> token_gradients(B * (2 + H) * N), logit_sums(B * H * C),
      power_sums(op.power == 0 ? 0 : B * 4 * C);
  std::vector<T> key_gradients(B * H * C), query_gradients(B * C), mean_gradients(B * C), ties;
  op.rows = data_of<T>(rows);
  op.vectors = data_of<T>(vectors);
  op.minimum = data_of<T>(minimum);
  op.grad = upstream.data();
  op.grad_attention = with_attention ? attention.data() : nullptr;
  op.token_gradients = token_gradients.data();
  op.logit_sums = logit_sums.data();
  op.power_sums = power_sums.data();
  op.mean_gradients = mean_gradients.data();
  op.grad_x = heads_of(wants_x ? grad_x : a.x, false, 1);
  const SimPoolKernels<T> kernels = FASTSSL_FOR_ISA(simpool_kernels<T>(op.power));
  // The minimum's gradient needs the whole batch.
  const int64_t group = group_of(op, op.power != 0);
  for (int64_t begin = 0; begin < B; begin += group) {
    const int64_t end = std::min(B, begin + group), images = end - begin;
    run_images(op, kernels.tokens, begin, end);
    if (op.power != 0) {
      ties = gradients_of_ties(op);
      op.tie_gradients = ties.data();
    }
    // du = scale w∘G, dq_h = Wk_h du_h, dmean = Wqᵀ dq.
    for (int64_t i = begin * H * C; i < end * H * C; ++i)
      key_gradients[i] = op.scale * weight[i % C] * logit_sums[i];
    T *keys = key_gradients.data() + begin * H * C, *queries = query_gradients.data() + begin * C;
    run_product(kernels.product, {array(keys, C, H * C, 1), weight_of(a.wk, depth, true),
                                  array(queries, depth, C, 1), H, images, C, depth});
    if (!wants_x) continue;
    run_product(kernels.product, {array(queries, 0, C, 1), weight_of(a.wq, 0, false),
                                  array(mean_gradients.data() + begin * C, 0, C, 1), 1, images, C, C});
    run_images(op, kernels.input, begin, end);
  }
  if (wants_parameters) parameter_gradients(op, kernels, ties, query_gradients, key_gradients, results);
  return {grad_x, results[0], results[1], results[2], results[3], results[4], results[5]};
}

Results forward(const Tensor& x, const Tensor& wq, const Tensor& bq, const Tensor& wk,
                const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& beta, int64_t num_heads,
                double scale, double gamma, int64_t channel_min, double eps, double norm_eps) {
  const Arguments a{x,         wq,    bq,    wk,          norm_weight, norm_bias, beta,
                    num_heads, scale, gamma, channel_min, eps,         norm_eps};
  return a.in_double() ? forward_as<double>(a) : forward_as<float>(a);
}

Gradients backward(const Tensor& grad, const Tensor& grad_attention, const Tensor& rows,
                   const Tensor& vectors, const Tensor& minimum, const Tensor& x, const Tensor& wq,
                   const Tensor& bq, const Tensor& wk, const Tensor& norm_weight, const Tensor& norm_bias,
                   const Tensor& beta, int64_t num_heads, double scale, double gamma, int64_t channel_min,
                   double eps, double norm_eps, int64_t wanted) {
  const Arguments a{x,         wq,    bq,    wk,          norm_weight, norm_bias, beta,
                    num_heads, scale, gamma, channel_min, eps,         norm_eps};
  return a.in_double() ? backward_as<double>(a, grad, grad_attention, rows, vectors, minimum, wanted)
                       : backward_as<float>(a, grad, grad_attention, rows, vectors, minimum, wanted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("simpool_forward", TORCH_BOX(&forward));
  m.impl("simpool_backward", TORCH_BOX(&backward));
}

}  // namespace fastssl::cpu
