// self_relation, forward, on CUDA: launch and registration. The kernel is in self_relation.cuh, the schema in
// csrc/schema.cpp, what is refused before a call comes here in fastssl/ops/self_relation.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>

#include "self_relation.cuh"

namespace fastssl::cuda::self_relation {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Launch {
  Problem problem;
  dim3 grid;
  size_t shared;
  cudaStream_t stream;
};

template <class X>
void launch(const Launch& l, const Tensor& x, const Tensor& columns, const Tensor& out) {
  const auto kernel = forward<X>;
  // A block gets more than 48 KB only after asking. The permission belongs to kernel and device: it is asked
  // for at each call, which is cheaper than to remember it safely for every thread and device.
  if (l.shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared));
    if (error != cudaSuccess) (void)cudaGetLastError();  // or the next launch check would find it
    STD_TORCH_CHECK(error == cudaSuccess, "self_relation: the CUDA kernel needs ", l.shared,
                    " bytes of shared memory for the columns of one head: ", cudaGetErrorString(error));
  }
  kernel<<<l.grid, kThreads, l.shared, l.stream>>>(l.problem, static_cast<const X*>(x.const_data_ptr()),
                                                   columns.const_data_ptr(),
                                                   static_cast<X*>(out.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "self_relation: the CUDA kernel could not be launched (grid ",
                  l.grid.x, " x ", l.grid.y, ", ", l.shared,
                  " bytes of shared memory): ", cudaGetErrorString(error));
}

Storage storage_of(const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      STD_TORCH_CHECK(false, "self_relation: the CUDA kernel takes ", argument,
                      " of dtype float32, bfloat16 or float16, got another");
  }
}

Tensor self_relation_forward(const Tensor& x, const Tensor& columns, int64_t channel, int64_t num_heads,
                             double scale, int64_t normalize, int64_t symmetric) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t images = x.size(0), tokens = x.size(1), head_channels = x.size(2) / num_heads;
  const int64_t rows = channel ? head_channels : tokens, others = channel ? head_channels : columns.size(1);
  Tensor out = torch::stable::new_empty(x, {images, num_heads, rows, others});
  if (out.numel() == 0) return out;
  const int64_t pairs = images * num_heads;
  STD_TORCH_CHECK(pairs <= INT_MAX && tokens < (1 << 30) && others < (1 << 30),
                  "self_relation: the CUDA kernel takes at most 2^31 - 1 pairs of image and head and 2^30 - "
                  "1 tokens, got ",
                  pairs, " pairs, ", tokens, " tokens and ", others, " columns");

  Launch l;
  l.problem = describe(x.sizes().data(), x.strides().data(), columns.sizes().data(), columns.strides().data(),
                       storage_of("columns", columns), channel != 0, num_heads, scale, normalize != 0,
                       symmetric != 0);
  l.shared = shared_bytes(l.problem.columns, l.problem.depth, l.problem.symmetric);
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess,
                  "self_relation: the CUDA device does not answer: ", cudaGetErrorString(error));
  l.grid = dim3(static_cast<unsigned>(pairs), row_splits(pairs, l.problem.rows, multiprocessors));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  l.stream = static_cast<cudaStream_t>(stream);

  switch (storage_of("x", x)) {
    case Storage::float32:
      launch<float>(l, x, columns, out);
      break;
    case Storage::bfloat16:
      launch<__nv_bfloat16>(l, x, columns, out);
      break;
    case Storage::float16:
      launch<__half>(l, x, columns, out);
      break;
  }
  return out;
}

}  // namespace
}  // namespace fastssl::cuda::self_relation

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) {
  m.impl("self_relation_forward", TORCH_BOX(&fastssl::cuda::self_relation::self_relation_forward));
}
