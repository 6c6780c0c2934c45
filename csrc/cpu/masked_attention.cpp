// masked_attention on the CPU: registration, checks of what the raw operators are given, and the kept tokens
// as sequences.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "cpu/sequences.h"
#include "cpu/tensors.h"

namespace fastssl::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (B, H, N, d): heads of rows.
Strided rows_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// (B, H, N)
Strided lse_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), 0};
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keep, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(3) > 0, "masked_attention: q must be (B, H, N, d)");
  for (const Tensor* t : {&k, &v}) {
    STD_TORCH_CHECK(t->dim() == 4 && t->scalar_type() == q.scalar_type(),
                    "masked_attention: q, k and v must have one shape and dtype");
    for (int64_t d = 0; d < 4; ++d)
      STD_TORCH_CHECK(t->size(d) == q.size(d), "masked_attention: q, k and v must have one shape and dtype");
  }
  const int64_t batch = q.size(0), length = q.size(2);
  Attention op;
  op.q = rows_of(q);
  op.k = rows_of(k);
  op.v = rows_of(v);
  op.heads = q.size(1);
  op.depth = q.size(3);
  op.scale = scale;
  if (keep.dim() == 1) {
    STD_TORCH_CHECK(keep.numel() == 0, "masked_attention: keep must be (B, N) or empty");
    for (int64_t b = 0; b < batch; ++b) op.sequences.push_back({b, 0, length});
    return op;
  }
  STD_TORCH_CHECK(keep.dim() == 2 && keep.size(0) == batch && keep.size(1) == length &&
                      keep.scalar_type() == ScalarType::Bool,
                  "masked_attention: keep must be (B, N) bool or empty");
  op.index.reserve(batch * length + 1);
  op.dropped.reserve(batch * length);
  for (int64_t b = 0; b < batch; ++b) {
    const bool* row = static_cast<const bool*>(keep.data_ptr()) + b * keep.stride(0);
    const int64_t begin = static_cast<int64_t>(op.index.size());
    for (int64_t n = 0; n < length; ++n) {
      const bool kept = row[n * keep.stride(1)];
      kept ? op.index.push_back(n) : op.dropped.push_back(b * length + n);
    }
    op.sequences.push_back({b, begin, static_cast<int64_t>(op.index.size()) - begin});
  }
  // An index without elements would mean that tokens follow each other.
  if (op.index.empty()) op.index.push_back(0);
  return op;
}
// Zeros for what is dropped; `rows` is contiguous and has one row per token.
void clear_dropped(const Attention& op, const Tensor& rows, int64_t row_elements) {
  const int64_t bytes = row_elements * element_size(dtype_of(rows));
  char* data = static_cast<char*>(rows.data_ptr());
  torch::stable::parallel_for(0, static_cast<int64_t>(op.dropped.size()), 64,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  char* row = data + op.dropped[i] * bytes;
                                  if (op.streams) {
                                    stream_zeros(row, bytes);
                                  } else {
                                    std::memset(row, 0, bytes);
                                  }
                                }
                                stream_end();
                              });
}

// The output as (B, N, H, d).
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keep,
                                   double scale) {
  Attention op = describe(q, k, v, keep, scale);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)});
  Tensor lse =
      torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)},
                               op.q.dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float);
  op.streams = is_large(out);
  clear_dropped(op, out, op.heads * op.depth);
  if (!op.dropped.empty()) torch::stable::zero_(lse);
  op.out = {out.data_ptr(), op.q.dtype, out.stride(0), out.stride(2), out.stride(1), 1};
  op.lse = lse_of(lse);
  attention_forward(op);
  return {out, lse};
}

Tensor backward(const Tensor& grad, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& keep, double scale) {
  Attention op = describe(q, k, v, keep, scale);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == q.size(0) && grad.size(1) == q.size(1) &&
                      grad.size(2) == q.size(2) && grad.size(3) == q.size(3) &&
                      grad.scalar_type() == q.scalar_type(),
                  "masked_attention: grad must have q's shape and dtype");
  const ScalarType computed = op.q.dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == q.size(0) && lse.size(1) == q.size(1) &&
                      lse.size(2) == q.size(2) && lse.scalar_type() == computed,
                  "masked_attention: lse must be (B, H, N), as forward gave it");
  op.lse = lse_of(lse);
  Tensor result = torch::stable::new_empty(q, {q.size(0), q.size(2), 3, q.size(1), q.size(3)});
  op.streams = is_large(result);
  clear_dropped(op, result, 3 * op.heads * op.depth);
  op.grad = rows_of(grad);
  Strided* gradients[3] = {&op.grad_q, &op.grad_k, &op.grad_v};
  for (int64_t i = 0; i < 3; ++i) {
    char* first = static_cast<char*>(result.data_ptr()) + i * result.stride(2) * element_size(op.q.dtype);
    *gradients[i] = {first, op.q.dtype, result.stride(0), result.stride(3), result.stride(1), 1};
  }
  attention_backward(op);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("masked_attention_forward", TORCH_BOX(&forward));
  m.impl("masked_attention_backward", TORCH_BOX(&backward));
}

}  // namespace fastssl::cpu
