// From stable-ABI tensors to the plain types of the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/common.h"

namespace fastssl::cpu {

inline Dtype dtype_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "fastssl: tensors must be float32, float64, bfloat16 or float16");
  }
}

// Whether a result is to be written past the caches.
inline bool is_large(const torch::stable::Tensor& t) {
  return t.numel() * element_size(dtype_of(t)) >= kStreamBytes;
}

// (B, N, C) as heads of rows: tokens are the rows of "pixel", the head's channels those of "channel".
inline Strided heads_of(const torch::stable::Tensor& x, bool channel, int64_t num_heads) {
  const int64_t depth = x.size(2) / num_heads;
  const int64_t token = x.stride(1), column = x.stride(2);
  return {x.data_ptr(),
          dtype_of(x),
          x.stride(0),
          depth * column,
          channel ? column : token,
          channel ? token : column};
}

}  // namespace fastssl::cpu
