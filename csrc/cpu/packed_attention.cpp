// packed_attention on the CPU: registration, checks of what the raw operators are given, and the split over
// threads of both kinds of attention.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <numeric>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/sequences.h"
#include "cpu/tensors.h"

#define FASTSSL_KERNEL "cpu/packed_attention.h"
#include "cpu/foreach_isa.h"

namespace fastssl::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Items (sequence · heads + head) for each of several threads, of about equal work: the longest first, each
// to the thread that has the least to do. Which thread has an item changes no result.
std::vector<std::vector<int64_t>> shares_of(const Attention& op, int64_t threads) {
  std::vector<int64_t> items;
  for (int64_t s = 0; s < static_cast<int64_t>(op.sequences.size()); ++s)
    for (int64_t h = 0; h < op.heads && op.sequences[s].count > 0; ++h) items.push_back(s * op.heads + h);
  const auto count = [&](int64_t item) { return op.sequences[item / op.heads].count; };
  std::stable_sort(items.begin(), items.end(), [&](int64_t a, int64_t b) { return count(a) > count(b); });
  std::vector<std::vector<int64_t>> shares(threads);
  std::vector<double> work(threads);
  for (const int64_t item : items) {
    const int64_t least = std::min_element(work.begin(), work.end()) - work.begin();
    shares[least].push_back(item);
    const double tokens = static_cast<double>(count(item));
    work[least] += tokens * (tokens + 16);  // products, and what goes with the tokens
  }
  return shares;
}

void run(const Attention& op, bool backward) {
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<std::vector<int64_t>> shares = shares_of(op, threads);
  const bool doubles = op.q.dtype == Dtype::kDouble;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t *items = shares[t].data(), count = static_cast<int64_t>(shares[t].size());
      if (doubles) {
        FASTSSL_FOR_ISA(attention_items<double>(op, backward, items, count));
      } else {
        FASTSSL_FOR_ISA(attention_items<float>(op, backward, items, count));
      }
    }
  });
}

// (T, H, d): heads of rows.
Strided rows_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), 0, t.stride(1), t.stride(0), t.stride(2)};
}

// (H, T)
Strided lse_of(const Tensor& t) { return {t.data_ptr(), dtype_of(t), 0, t.stride(0), t.stride(1), 0}; }

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                   double scale) {
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) > 0, "packed_attention: q must be (T, H, d)");
  for (const Tensor* t : {&k, &v})
    STD_TORCH_CHECK(t->dim() == 3 && t->size(0) == q.size(0) && t->size(1) == q.size(1) &&
                        t->size(2) == q.size(2) && t->scalar_type() == q.scalar_type(),
                    "packed_attention: q, k and v must have one shape and dtype");
  STD_TORCH_CHECK(
      cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.scalar_type() == ScalarType::Int,
      "packed_attention: cu_seqlens must be (S + 1,) int32");
  Attention op;
  op.q = rows_of(q);
  op.k = rows_of(k);
  op.v = rows_of(v);
  op.heads = q.size(1);
  op.depth = q.size(2);
  op.scale = scale;
  const int32_t* starts = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t step = cu_seqlens.stride(0), sequences = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(starts[0] == 0 && starts[sequences * step] == q.size(0),
                  "packed_attention: cu_seqlens must begin with 0 and end with T");
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = starts[s * step], count = starts[(s + 1) * step] - begin;
    STD_TORCH_CHECK(count >= 0, "packed_attention: cu_seqlens must not fall");
    op.sequences.push_back({0, begin, count});
  }
  return op;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens, double scale) {
  Attention op = describe(q, k, v, cu_seqlens, scale);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(
      q, {q.size(1), q.size(0)}, op.q.dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float);
  op.streams = is_large(out);
  op.out = rows_of(out);
  op.lse = lse_of(lse);
  attention_forward(op);
  return {out, lse};
}

Tensor backward(const Tensor& grad, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& cu_seqlens, double scale) {
  Attention op = describe(q, k, v, cu_seqlens, scale);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == q.size(0) && grad.size(1) == q.size(1) &&
                      grad.size(2) == q.size(2) && grad.scalar_type() == q.scalar_type(),
                  "packed_attention: grad must have q's shape and dtype");
  const ScalarType computed = op.q.dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      lse.dim() == 2 && lse.size(0) == q.size(1) && lse.size(1) == q.size(0) && lse.scalar_type() == computed,
      "packed_attention: lse must be (H, T), as forward gave it");
  op.lse = lse_of(lse);
  Tensor result = torch::stable::new_empty(q, {q.size(0), 3, q.size(1), q.size(2)});
  op.streams = is_large(result);
  op.grad = rows_of(grad);
  Strided* gradients[3] = {&op.grad_q, &op.grad_k, &op.grad_v};
  for (int64_t i = 0; i < 3; ++i) {
    char* first = static_cast<char*>(result.data_ptr()) + i * result.stride(1) * element_size(op.q.dtype);
    *gradients[i] = {first, op.q.dtype, 0, result.stride(2), result.stride(0), 1};
  }
  attention_backward(op);
  return result;
}

}  // namespace

void attention_forward(const Attention& op) { run(op, false); }
void attention_backward(const Attention& op) { run(op, true); }

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&forward));
  m.impl("packed_attention_backward", TORCH_BOX(&backward));
}

}  // namespace fastssl::cpu
