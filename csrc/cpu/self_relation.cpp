// self_relation on the CPU: registration, checks of what the raw operators are given, and the split over
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "cpu/common.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace fastssl::cpu {

// One call: R rows x, M columns y (y is x where symmetric) of depth K, for every (batch, head).
struct SelfRelation {
  Strided x, y;
  void* relation = nullptr;  // (batch, heads, rows, columns), contiguous
  Dtype relation_dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, rows = 0, columns = 0, depth = 0;
  double scale = 0;
  bool normalize = false, symmetric = false;
  // Backward alone.
  Strided grad, grad_x, grad_y;
  void* offsets = nullptr;  // (batch, heads, rows, 2)
};

struct ForwardKernels {
  void (*heads)(const SelfRelation&, int64_t begin, int64_t end);
  void (*strips)(const SelfRelation&, int64_t begin, int64_t end);
  int64_t strip_rows;
};
struct BackwardKernels {
  void (*offsets)(const SelfRelation&, int64_t begin, int64_t end);
  void (*strips)(const SelfRelation&, bool of_columns, int64_t begin, int64_t end);
};

// Up to this size the matrix of one head stays in a core's second-level cache.
inline bool keeps_head_in_scratch(int64_t rows, int64_t item_size) {
  return rows * rows * item_size <= (int64_t{5} << 18);
}

}  // namespace fastssl::cpu

#define FASTSSL_KERNEL "cpu/self_relation.h"
#include "cpu/foreach_isa.h"

namespace fastssl::cpu {
namespace {

using torch::stable::Tensor;

SelfRelation describe(const Tensor& x, const Tensor& columns, int64_t channel, int64_t num_heads,
                      double scale, int64_t normalize, int64_t symmetric) {
  STD_TORCH_CHECK(x.dim() == 3 && columns.dim() == 3, "self_relation: x and columns must be (B, N, C)");
  STD_TORCH_CHECK(num_heads > 0 && x.size(2) % num_heads == 0,
                  "self_relation: num_heads must divide the channels");
  STD_TORCH_CHECK(columns.size(0) == x.size(0) && columns.size(2) == x.size(2),
                  "self_relation: columns must have x's batch and channels");
  STD_TORCH_CHECK((!channel && !symmetric) || columns.size(1) == x.size(1),
                  "self_relation: columns must have x's tokens");
  SelfRelation op;
  op.x = heads_of(x, channel, num_heads);
  op.y = symmetric ? op.x : heads_of(columns, channel, num_heads);
  op.batch = x.size(0);
  op.heads = num_heads;
  const int64_t depth = x.size(2) / num_heads;
  op.rows = channel ? depth : x.size(1);
  op.columns = symmetric ? op.rows : channel ? depth : columns.size(1);
  op.depth = channel ? x.size(1) : depth;
  op.scale = scale;
  op.normalize = normalize != 0;
  op.symmetric = symmetric != 0;
  return op;
}

bool in_double(const SelfRelation& op) {
  return op.x.dtype == Dtype::kDouble || op.y.dtype == Dtype::kDouble;
}

// Enough heads for every thread to take whole ones without one waiting long for another.
bool by_heads(const SelfRelation& op) {
  const int64_t threads = torch::stable::get_num_threads();
  return op.batch * op.heads >= (threads == 1 ? 1 : 4 * threads);
}

Tensor forward(const Tensor& x, const Tensor& columns, int64_t channel, int64_t num_heads, double scale,
               int64_t normalize, int64_t symmetric) {
  SelfRelation op = describe(x, columns, channel, num_heads, scale, normalize, symmetric);
  Tensor relation = torch::stable::new_empty(x, {op.batch, op.heads, op.rows, op.columns});
  if (relation.numel() == 0) return relation;
  op.relation = relation.data_ptr();
  op.relation_dtype = dtype_of(relation);
  const ForwardKernels kernels = FASTSSL_FOR_ISA(forward_kernels(in_double(op)));
  const int64_t heads = op.batch * op.heads;
  const int64_t item_size = in_double(op) ? 8 : 4;
  const bool fits = keeps_head_in_scratch(op.rows, item_size) || element_size(op.relation_dtype) == item_size;
  if (op.symmetric && fits && by_heads(op)) {
    torch::stable::parallel_for(0, heads, 1,
                                [&](int64_t begin, int64_t end) { kernels.heads(op, begin, end); });
  } else {
    const int64_t strips = heads * ceil_div(op.rows, kernels.strip_rows);
    torch::stable::parallel_for(0, strips, 1,
                                [&](int64_t begin, int64_t end) { kernels.strips(op, begin, end); });
  }
  return relation;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& relation, const Tensor& x,
                                    const Tensor& columns, int64_t channel, int64_t num_heads, double scale,
                                    int64_t normalize, int64_t symmetric, int64_t wanted) {
  SelfRelation op = describe(x, columns, channel, num_heads, scale, normalize, symmetric);
  STD_TORCH_CHECK(relation.is_contiguous(), "self_relation: relation must be contiguous");
  for (const Tensor& t : {grad, relation}) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == op.batch && t.size(1) == op.heads && t.size(2) == op.rows &&
                        t.size(3) == op.columns && dtype_of(t) == op.x.dtype,
                    "self_relation: grad and relation must be (B, H, R, M) in x's dtype");
  }
  STD_TORCH_CHECK(!(op.symmetric && (wanted & 2)), "self_relation: without columns they have no gradient");
  const bool wants_x = wanted & 1, wants_y = wanted & 2;
  Tensor grad_x = wants_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_y = wants_y ? torch::stable::empty_like(columns) : torch::stable::new_empty(columns, {0});
  if (op.depth == 0 || op.batch == 0 || (op.rows == 0 && op.columns == 0)) return {grad_x, grad_y};
  Tensor offsets = torch::stable::new_empty(
      x, {op.batch, op.heads, op.rows, 2},
      in_double(op) ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  op.relation = relation.data_ptr();
  op.relation_dtype = dtype_of(relation);
  op.offsets = offsets.data_ptr();
  op.grad = {grad.data_ptr(), dtype_of(grad), grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)};
  if (wants_x) op.grad_x = heads_of(grad_x, channel, num_heads);
  if (wants_y) op.grad_y = heads_of(grad_y, channel, num_heads);
  const BackwardKernels kernels = FASTSSL_FOR_ISA(backward_kernels(in_double(op), op.relation_dtype));
  const int64_t strip_rows = FASTSSL_FOR_ISA(forward_kernels(in_double(op))).strip_rows;
  const int64_t heads = op.batch * op.heads;
  const int64_t x_strips = ceil_div(op.rows, strip_rows), y_strips = ceil_div(op.columns, strip_rows);
  if (by_heads(op)) {
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {  // one head's relation and gradient stay in cache for all three
        kernels.offsets(op, h * op.rows, (h + 1) * op.rows);
        if (wants_x) kernels.strips(op, false, h * x_strips, (h + 1) * x_strips);
        if (wants_y) kernels.strips(op, true, h * y_strips, (h + 1) * y_strips);
      }
    });
  } else {
    torch::stable::parallel_for(0, heads * op.rows, 16,
                                [&](int64_t begin, int64_t end) { kernels.offsets(op, begin, end); });
    if (wants_x) {
      torch::stable::parallel_for(0, heads * x_strips, 1,
                                  [&](int64_t begin, int64_t end) { kernels.strips(op, false, begin, end); });
    }
    if (wants_y) {
      torch::stable::parallel_for(0, heads * y_strips, 1,
                                  [&](int64_t begin, int64_t end) { kernels.strips(op, true, begin, end); });
    }
  }
  return {grad_x, grad_y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("self_relation_forward", TORCH_BOX(&forward));
  m.impl("self_relation_backward", TORCH_BOX(&backward));
}

}  // namespace fastssl::cpu
