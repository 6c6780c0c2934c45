// csrc/cuda/self_relation.cuh on the CPU, behind C functions for ctypes (tests/test_cuda_sources.py).
#include "cuda_on_cpu.h"

#include "cuda/self_relation.cuh"

namespace sr = fastssl::cuda::self_relation;

namespace {

// A tensor as Python sees it: its storage, where in it the first element lies, and the storage type.
struct Array {
  const void* storage;
  int64_t bytes, offset;
  int64_t type;  // as sr::Storage
  int64_t sizes[3], strides[3];
};

}  // namespace

extern "C" {

// Writes the (B, H, R, M) relation to `out`; "" or the error of the launch. `multiprocessors` decides how
// rows are split.
const char* forward(const Array* x, const Array* y, void* out, int64_t out_bytes, int channel, int64_t heads,
                    double scale, int normalize, int symmetric, int multiprocessors, int order) {
  static std::string error;
  const sr::Problem problem =
      sr::describe(x->sizes, x->strides, y->sizes, y->strides, static_cast<sr::Storage>(y->type), channel,
                   heads, scale, normalize, symmetric);
  const int64_t pairs = x->sizes[0] * heads;
  const size_t shared = sr::shared_bytes(problem.columns, problem.depth, symmetric);
  const dim3 grid(pairs, sr::row_splits(pairs, problem.rows, multiprocessors));
  const cuda_on_cpu::Guarded x_memory("x", x->storage, x->bytes), y_memory("columns", y->storage, y->bytes);
  const cuda_on_cpu::Guarded out_memory("out", out, out_bytes);
  const void* y_first = static_cast<const char*>(y_memory.data()) + y->offset;
  const auto run = [&](auto x_value) {
    using X = decltype(x_value);
    const void* x_first = static_cast<const char*>(x_memory.data()) + x->offset;
    error = cuda_on_cpu::launch(grid, sr::kThreads, shared, order, [&] {
      sr::forward<X>(problem, static_cast<const X*>(x_first), y_first, static_cast<X*>(out_memory.data()));
    });
  };
  if (x->type == 0) run(float{});
  if (x->type == 1) run(__nv_bfloat16{});
  if (x->type == 2) run(__half{});
  memcpy(out, out_memory.data(), out_bytes);
  return error.c_str();
}

int64_t shared_bytes(int columns, int depth, int symmetric) {
  return static_cast<int64_t>(sr::shared_bytes(columns, depth, symmetric));
}

int64_t row_splits(int64_t pairs, int64_t rows, int multiprocessors) {
  return sr::row_splits(pairs, rows, multiprocessors);
}

// Every storage value to float32 and back, to compare the stand-in types of cuda_on_cpu.h with torch's.
void from_float32(int64_t type, const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = type == 1 ? __float2bfloat16_rn(from[i]).bits : __float2half_rn(from[i]).bits;
  }
}
void to_float32(int64_t type, const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = type == 1 ? __bfloat162float({from[i]}) : __half2float({from[i]});
  }
}
}
