// simpool on CUDA: checks of what the raw operators are given, memory, launch and registration. The order of
// the launches is in simpool_launches.cuh, the schema in csrc/schema.cpp, what is refused before a call comes
// here in fastssl/ops/simpool.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <tuple>

#include "simpool_launches.cuh"

namespace fastssl::cuda::simpool {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Launches on a stream; see simpool_launches.cuh.
struct StreamLauncher {
  cudaStream_t stream;

  static void check(cudaError_t error, const char* name) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // or the next launch check would find it
    STD_TORCH_CHECK(false, "simpool: the CUDA kernel ", name,
                    " could not be launched: ", cudaGetErrorString(error));
  }

  void zero(void* memory, size_t bytes) { check(cudaMemsetAsync(memory, 0, bytes, stream), "zero"); }

  template <class Kernel, class Argument>
  void run(const char* name, Kernel kernel, int64_t blocks, int threads, size_t shared,
           const Argument& argument) {
    STD_TORCH_CHECK(blocks <= INT_MAX, "simpool: the CUDA kernel ", name, " would take ", blocks, " blocks");
    // A block gets more than 48 KB only after asking. The permission belongs to kernel and device: it is
    // asked for at each call, which is cheaper than to remember it safely for every thread and device.
    if (shared > 48 * 1024) {
      check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          name);
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(argument);
    check(cudaGetLastError(), name);
  }
};

Storage storage_of(const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      STD_TORCH_CHECK(false, "simpool: the CUDA kernels take ", argument,
                      " of dtype float32, bfloat16 or float16, got another");
  }
}

Values values_of(const char* argument, const Tensor& t, int64_t count) {
  if (t.numel() == 0) return {};
  STD_TORCH_CHECK(t.numel() == count && (count == 1 || t.dim() == 1), "simpool: ", argument, " must have ",
                  count, " elements");
  return {t.const_data_ptr(), storage_of(argument, t), t.dim() == 1 ? t.stride(0) : 0};
}

Matrix matrix_of(const char* argument, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == channels && t.size(1) == channels, "simpool: ", argument,
                  " must be (C, C)");
  return {t.data_ptr(), storage_of(argument, t), t.stride(0), t.stride(1)};
}

Result result_of(const Tensor& t) {
  if (t.numel() == 0) return {};
  return {t.mutable_data_ptr(), storage_of("parameters", t), t.dim() == 1 ? t.stride(0) : 0};
}

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

int element_bytes(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// The shape of a call, split over this device's multiprocessors.
Shape shape_of(const Tensor& x, int64_t heads, bool power) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0, "simpool: x must be (B, N, C) with tokens");
  STD_TORCH_CHECK(heads > 0 && x.size(2) % heads == 0, "simpool: num_heads must divide the channels");
  STD_TORCH_CHECK(
      x.size(0) < (1 << 30) && x.size(1) < (1 << 30) && x.size(2) <= kMaxChannels && heads <= kMaxHeads,
      "simpool: the CUDA kernels take at most ", kMaxChannels, " channels, ", kMaxHeads,
      " heads and 2^30 - 1 images or tokens, got ", x.size(2), " channels, ", heads, " heads, ", x.size(0),
      " images and ", x.size(1), " tokens");
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess,
                  "simpool: the CUDA device does not answer: ", cudaGetErrorString(error));
  const Storage storage = storage_of("x", x);
  return split(x.size(0), x.size(1), x.size(2), heads, element_bytes(storage), power, multiprocessors);
}

StreamLauncher launcher_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return {static_cast<cudaStream_t>(stream)};
}

// The workspace of a call, whose parts go to `p`. The allocator keeps it for this stream when it is let go.
template <class Call>
Tensor workspace_of(const Tensor& x, Call& p, bool power) {
  Workspace space;
  lay_out(space, p, power);
  Tensor memory = torch::stable::new_empty(x, {space.used}, ScalarType::Float);
  space = {static_cast<float*>(memory.mutable_data_ptr()), 0};
  lay_out(space, p, power);
  return memory;
}

const float* kept(const char* argument, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count && t.scalar_type() == ScalarType::Float,
                  "simpool: ", argument, " must be that of the forward");
  return static_cast<const float*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> simpool_forward(
    const Tensor& x, const Tensor& wq, const Tensor& bq, const Tensor& wk, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& beta, int64_t num_heads, double scale, double gamma,
    int64_t channel_min, double eps, double norm_eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool power = gamma != 0.0;
  Forward p;
  p.shape = shape_of(x, num_heads, power);
  const int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  p.norm_weight = values_of("norm_weight", norm_weight, channels);
  p.norm_bias = values_of("norm_bias", norm_bias, channels);
  p.beta = values_of("beta", beta, 1);
  STD_TORCH_CHECK(p.norm_weight.data != nullptr && p.norm_bias.data != nullptr,
                  "simpool: norm_weight and norm_bias must be (C,)");
  const Matrix wq_matrix = matrix_of("wq", wq, channels), wk_matrix = matrix_of("wk", wk, channels);
  const Values bq_values = values_of("bq", bq, channels);

  Tensor out = torch::stable::new_empty(x, {images, channels});
  Tensor attention = torch::stable::new_empty(x, {images, num_heads, tokens});
  Tensor rows = torch::stable::new_empty(x, {images, 2 + 2 * num_heads, tokens}, ScalarType::Float);
  Tensor vectors = torch::stable::new_empty(x, {images, 3 + num_heads, channels}, ScalarType::Float);
  Tensor minimum = power && channel_min ? torch::stable::new_empty(x, {images, channels}, ScalarType::Float)
                                        : torch::stable::new_empty(x, {power ? 1 : 0}, ScalarType::Float);
  if (images == 0) {
    torch::stable::zero_(minimum);
    return {out, attention, rows, vectors, minimum};
  }
  p.x = x.const_data_ptr();
  p.strides = strides_of(x);
  p.scale = static_cast<float>(scale);
  p.gamma = static_cast<float>(gamma);
  p.eps = static_cast<float>(eps);
  p.norm_eps = static_cast<float>(norm_eps);
  p.channel_minimum = channel_min != 0;
  p.out = out.mutable_data_ptr();
  p.attention = attention.mutable_data_ptr();
  p.rows = static_cast<float*>(rows.mutable_data_ptr());
  p.vectors = static_cast<float*>(vectors.mutable_data_ptr());
  p.minimum = static_cast<float*>(minimum.mutable_data_ptr());
  const Tensor memory = workspace_of(x, p, power);
  StreamLauncher launcher = launcher_of(x);
  with_types(storage_of("x", x), power, [&](auto x_value, auto with) {
    run_forward<decltype(x_value), decltype(with)::value>(launcher, p, wq_matrix, wk_matrix, bq_values);
  });
  return {out, attention, rows, vectors, minimum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> simpool_backward(
    const Tensor& grad, const Tensor& grad_attention, const Tensor& rows, const Tensor& vectors,
    const Tensor& minimum, const Tensor& x, const Tensor& wq, const Tensor& bq, const Tensor& wk,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& beta, int64_t num_heads, double scale,
    double gamma, int64_t channel_min, double eps, double norm_eps, int64_t wanted) {
  (void)norm_eps;  // it is in the deviations that the forward kept
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool power = gamma != 0.0, wants_x = wanted & 1, wants_parameters = wanted & 2;
  Backward p;
  p.shape = shape_of(x, num_heads, power);
  const int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  const auto gradient_of = [](const Tensor& t, bool wants) {
    return wants ? torch::stable::empty_like(t) : torch::stable::new_empty(t, {0});
  };
  Tensor grad_x = gradient_of(x, wants_x);
  Tensor grad_wq = gradient_of(wq, wants_parameters), grad_bq = gradient_of(bq, wants_parameters);
  Tensor grad_wk = gradient_of(wk, wants_parameters);
  Tensor grad_weight = gradient_of(norm_weight, wants_parameters);
  Tensor grad_bias = gradient_of(norm_bias, wants_parameters);
  Tensor grad_beta = gradient_of(beta, wants_parameters);
  if (images == 0 || (!wants_x && !wants_parameters)) {
    for (Tensor* t : {&grad_wq, &grad_bq, &grad_wk, &grad_weight, &grad_bias, &grad_beta}) {
      torch::stable::zero_(*t);
    }
    return {grad_x, grad_wq, grad_bq, grad_wk, grad_weight, grad_bias, grad_beta};
  }

  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == images && grad.size(1) == channels && grad.scalar_type() == type,
      "simpool: grad must be (B, C) in x's dtype");
  p.grad = grad.const_data_ptr();
  p.grad_image = grad.stride(0);
  p.grad_channel = grad.stride(1);
  if (grad_attention.numel() != 0) {
    STD_TORCH_CHECK(grad_attention.dim() == 3 && grad_attention.size(0) == images &&
                        grad_attention.size(1) == num_heads && grad_attention.size(2) == tokens &&
                        grad_attention.scalar_type() == type,
                    "simpool: grad_attention must be (B, H, N) in x's dtype");
    p.grad_attention = grad_attention.const_data_ptr();
    p.attention_strides = strides_of(grad_attention);
  }
  p.rows = kept("rows", rows, images * (2 + 2 * num_heads) * tokens);
  p.vectors = kept("vectors", vectors, images * (3 + num_heads) * channels);
  p.minimum = kept("minimum", minimum, !power ? 0 : channel_min ? images * channels : 1);
  p.x = x.const_data_ptr();
  p.strides = strides_of(x);
  p.norm_weight = values_of("norm_weight", norm_weight, channels);
  p.norm_bias = values_of("norm_bias", norm_bias, channels);
  STD_TORCH_CHECK(p.norm_weight.data != nullptr && p.norm_bias.data != nullptr,
                  "simpool: norm_weight and norm_bias must be (C,)");
  (void)values_of("bq", bq, channels);
  (void)values_of("beta", beta, 1);
  p.scale = static_cast<float>(scale);
  p.gamma = static_cast<float>(gamma);
  p.eps = static_cast<float>(eps);
  p.channel_minimum = channel_min != 0;
  const Matrix wq_matrix = matrix_of("wq", wq, channels), wk_matrix = matrix_of("wk", wk, channels);
  Matrix grad_wq_matrix, grad_wk_matrix;
  if (wants_x) {
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_strides = strides_of(grad_x);
  }
  if (wants_parameters) {
    grad_wq_matrix = matrix_of("wq", grad_wq, channels);
    grad_wk_matrix = matrix_of("wk", grad_wk, channels);
    p.grad_norm_weight = result_of(grad_weight);
    p.grad_norm_bias = result_of(grad_bias);
    p.grad_bq = result_of(grad_bq);
    p.grad_beta = result_of(grad_beta);
  }
  const Tensor memory = workspace_of(x, p, power);
  StreamLauncher launcher = launcher_of(x);
  with_types(storage_of("x", x), power, [&](auto x_value, auto with) {
    run_backward<decltype(x_value), decltype(with)::value>(launcher, p, wq_matrix, wk_matrix, grad_wq_matrix,
                                                           grad_wk_matrix, wants_x, wants_parameters);
  });
  return {grad_x, grad_wq, grad_bq, grad_wk, grad_weight, grad_bias, grad_beta};
}

}  // namespace
}  // namespace fastssl::cuda::simpool

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) {
  m.impl("simpool_forward", TORCH_BOX(&fastssl::cuda::simpool::simpool_forward));
  m.impl("simpool_backward", TORCH_BOX(&fastssl::cuda::simpool::simpool_backward));
}
