// Small tensors of any strides and dtype as arrays of T, and back. For files that include cpu/foreach_isa.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "cpu/tensors.h"

namespace fastssl::cpu {

// f(first element as S*) for the element type of `t`.
template <class F>
void with_elements(const torch::stable::Tensor& t, F&& f) {
  switch (dtype_of(t)) {
    case Dtype::kFloat:
      return f(static_cast<float*>(t.data_ptr()));
    case Dtype::kDouble:
      return f(static_cast<double*>(t.data_ptr()));
    case Dtype::kBFloat16:
      return f(static_cast<BFloat16Bits*>(t.data_ptr()));
    case Dtype::kHalf:
      return f(static_cast<HalfBits*>(t.data_ptr()));
  }
}

// The elements of a tensor of at most three dimensions, in order.
template <class T>
std::vector<T> numbers_of(const torch::stable::Tensor& t) {
  std::vector<T> result(t.numel());
  if (result.empty()) return result;
  STD_TORCH_CHECK(t.dim() <= 3, "fastssl: tensors of numbers must have at most three dimensions");
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
  for (int64_t d = 0, at = 3 - t.dim(); d < t.dim(); ++d, ++at) {
    size[at] = t.size(d);
    stride[at] = t.stride(d);
  }
  with_elements(t, [&](const auto* data) {
    T* to = result.data();
    for (int64_t i = 0; i < size[0]; ++i)
      for (int64_t j = 0; j < size[1]; ++j)
        for (int64_t k = 0; k < size[2]; ++k)
          *to++ = static_cast<T>(portable::widen_one(data[i * stride[0] + j * stride[1] + k * stride[2]]));
  });
  return result;
}

// Numbers to a contiguous tensor, from element `offset` on; all of it where `count` is not given.
template <class T>
void write_numbers(const T* numbers, const torch::stable::Tensor& t, int64_t offset = 0, int64_t count = -1) {
  if (count < 0) count = t.numel();
  with_elements(t, [&](auto* data) {
    constexpr int64_t W = portable::Simd<T>::kWidth;
    for (int64_t i = 0; i < count; i += W) {
      const int64_t lanes = std::min(W, count - i);
      if constexpr (sizeof(T) == 8 || sizeof(*data) != 8)
        portable::store_part<T>(data + offset + i, portable::load_part<T>(numbers + i, lanes, T{0}), lanes);
    }
  });
}

}  // namespace fastssl::cpu
