// sample_tokens on the CPU: registration, checks of what the raw operators are given, and the split over
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

// A batch of maps of tokens in anybody's memory: strides in elements.
struct TokenMaps {
  void* data = nullptr;
  int64_t batch_stride = 0, y_stride = 0, x_stride = 0, channel_stride = 0;
};

// A batch of points or of what belongs to them: grid (B, P, 2), upstream gradient (B, P, C).
struct PointRows {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t batch_stride = 0, point_stride = 0, element_stride = 0;
};

// One call. What has x's dtype has no dtype of its own.
struct SampleTokens {
  Dtype dtype = Dtype::kFloat;
  TokenMaps x;
  PointRows grid;
  int64_t batch = 0, height = 0, width = 0, channels = 0, points = 0;
  void* out = nullptr;  // (B, P, C), contiguous
  // Backward alone.
  PointRows grad;
  TokenMaps grad_x;        // no data: not wanted
  void* slopes = nullptr;  // (B, blocks, P, 2), float or double: what each block of channels adds to the
                           // gradient of the grid; null: not wanted
  PointRows grad_grid;     // (B, P, 2)
};

// Work is split into items: image · blocks + block of channels. Sums run within an item, or over the blocks
// in their order, so that the split over threads changes nothing.
struct SampleKernels {
  int64_t (*forward_blocks)(const SampleTokens&);
  void (*forward)(const SampleTokens&, int64_t begin, int64_t end);
  int64_t (*backward_blocks)(const SampleTokens&);
  void (*backward)(const SampleTokens&, int64_t begin, int64_t end);
};

}  // namespace fastssl::cpu

#define FASTSSL_KERNEL "cpu/sample_tokens.h"
#include "cpu/foreach_isa.h"

namespace fastssl::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

SampleKernels kernels_for(Dtype dtype) {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512) return avx512::sample_kernels(dtype);
  if (current_isa() == Isa::kAvx2) return avx2::sample_kernels(dtype);
#endif
  return portable::sample_kernels(dtype);
}

TokenMaps maps_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}
PointRows rows_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2)};
}

SampleTokens describe(const Tensor& x, const Tensor& grid) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0,
                  "sample_tokens: x must be (B, h, w, C) with at least one token");
  STD_TORCH_CHECK(grid.dim() == 3 && grid.size(0) == x.size(0) && grid.size(2) == 2,
                  "sample_tokens: grid must be (B, P, 2) with x's batch");
  SampleTokens op;
  op.dtype = dtype_of(x);
  op.x = maps_of(x);
  op.grid = rows_of(grid);
  op.batch = x.size(0);
  op.height = x.size(1);
  op.width = x.size(2);
  op.channels = x.size(3);
  op.points = grid.size(1);
  return op;
}

Tensor forward(const Tensor& x, const Tensor& grid) {
  SampleTokens op = describe(x, grid);
  Tensor out = torch::stable::new_empty(x, {op.batch, op.points, op.channels});
  if (out.numel() == 0) return out;
  op.out = out.data_ptr();
  const SampleKernels kernels = kernels_for(op.dtype);
  torch::stable::parallel_for(0, op.batch * kernels.forward_blocks(op), 1,
                              [&](int64_t begin, int64_t end) { kernels.forward(op, begin, end); });
  return out;
}

// grad_grid = Σ over the blocks of channels, in their order.
template <class T, class G>
void add_slopes(const SampleTokens& op, int64_t blocks) {
  const T* slopes = static_cast<const T*>(op.slopes);
  G* out = static_cast<G*>(op.grad_grid.data);
  for (int64_t image = 0; image < op.batch; ++image, slopes += blocks * op.points * 2) {
    for (int64_t i = 0; i < op.points * 2; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += double{slopes[block * op.points * 2 + i]};
      portable::store_part<double>(out++, portable::broadcast<double>(sum), 1);
    }
  }
}
template <class T>
void add_slopes(const SampleTokens& op, int64_t blocks) {
  switch (op.grad_grid.dtype) {
    case Dtype::kFloat:
      return add_slopes<T, float>(op, blocks);
    case Dtype::kDouble:
      return add_slopes<T, double>(op, blocks);
    case Dtype::kBFloat16:
      return add_slopes<T, BFloat16Bits>(op, blocks);
    case Dtype::kHalf:
      return add_slopes<T, HalfBits>(op, blocks);
  }
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& grid, int64_t wanted) {
  SampleTokens op = describe(x, grid);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == op.batch && grad.size(1) == op.points &&
                      grad.size(2) == op.channels && dtype_of(grad) == op.dtype,
                  "sample_tokens: grad must be (B, P, C) in x's dtype");
  const bool wants_x = wanted & 1, wants_grid = wanted & 2;
  Tensor grad_x = wants_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_grid = wants_grid ? torch::stable::new_empty(grid, {op.batch, op.points, 2})
                                : torch::stable::new_empty(grid, {0});
  if (op.batch == 0 || !(wants_x || wants_grid)) return {grad_x, grad_grid};
  op.grad = rows_of(grad);
  if (wants_x) op.grad_x = maps_of(grad_x);
  const SampleKernels kernels = kernels_for(op.dtype);
  const int64_t blocks = kernels.backward_blocks(op);
  const bool in_double = op.dtype == Dtype::kDouble;
  Tensor slopes = torch::stable::new_empty(x, {wants_grid ? op.batch * blocks * op.points * 2 : 0},
                                           in_double ? ScalarType::Double : ScalarType::Float);
  if (wants_grid) {
    op.slopes = slopes.data_ptr();
    op.grad_grid = rows_of(grad_grid);
  }
  torch::stable::parallel_for(0, op.batch * blocks, 1,
                              [&](int64_t begin, int64_t end) { kernels.backward(op, begin, end); });
  if (wants_grid) in_double ? add_slopes<double>(op, blocks) : add_slopes<float>(op, blocks);
  return {grad_x, grad_grid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("sample_tokens_forward", TORCH_BOX(&forward));
  m.impl("sample_tokens_backward", TORCH_BOX(&backward));
}

}  // namespace fastssl::cpu
