// self_relation on the CPU: the table of kernels that self_relation.cpp calls. Included once per instruction
// set by foreach_isa.h.

#include "cpu/lengths.h"
#include "cpu/gradient_strips.h"
#include "cpu/self_relation_forward.h"
#include "cpu/self_relation_backward.h"

namespace fastssl::cpu::FASTSSL_ISA {

template <class T, class S>
struct Backward {
  static void strips(const SelfRelation& op, bool of_columns, int64_t begin, int64_t end) {
    if (op.symmetric) {
      gradient_strips<T, S, true, true>(op, begin, end);
    } else if (!of_columns) {
      gradient_strips<T, S, true, false>(op, begin, end);
    } else {
      gradient_strips<T, S, false, true>(op, begin, end);
    }
  }
  static constexpr BackwardKernels kernels{row_offsets<T, S>, strips};
};

inline BackwardKernels backward_kernels(bool in_double, Dtype relation) {
  switch (relation) {
    case Dtype::kDouble:
      return Backward<double, double>::kernels;
    case Dtype::kFloat:
      return in_double ? Backward<double, float>::kernels : Backward<float, float>::kernels;
    case Dtype::kBFloat16:
      return in_double ? Backward<double, BFloat16Bits>::kernels : Backward<float, BFloat16Bits>::kernels;
    default:
      return in_double ? Backward<double, HalfBits>::kernels : Backward<float, HalfBits>::kernels;
  }
}

inline ForwardKernels forward_kernels(bool in_double) {
  if (in_double) return {forward_heads<double>, forward_strips<double>, kTileRows};
  return {forward_heads<float>, forward_strips<float>, kTileRows};
}

}  // namespace fastssl::cpu::FASTSSL_ISA
