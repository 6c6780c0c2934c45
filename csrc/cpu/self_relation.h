// self_relation on the CPU: what forward and backward share, and the table of kernels that self_relation.cpp
// calls. Included once per instruction set by foreach_isa.h.

namespace fastssl::cpu::FASTSSL_ISA {

// Divides every lane of packed panels by its length; a vector of length at most kNoLength becomes zero.
constexpr double kNoLength = 1e-12;

template <class T, int LANES>
void inverse_lengths(const T* panel, int64_t depth, T* inverse) {
  double squares[LANES] = {};  // one long float chain of alike terms would round the same way every time
  for (int64_t k = 0; k < depth; ++k) {
    for (int l = 0; l < LANES; ++l) {
      const double element = panel[k * LANES + l];
      squares[l] += element * element;
    }
  }
  for (int l = 0; l < LANES; ++l)
    inverse[l] = squares[l] > kNoLength * kNoLength ? static_cast<T>(1 / std::sqrt(squares[l])) : T(0);
}
template <class T, int LANES>
void normalize_panels(T* panels, int64_t vectors, int64_t depth) {
  for (int64_t first = 0; first < vectors; first += LANES, panels += depth * LANES) {
    T inverse[LANES];
    inverse_lengths<T, LANES>(panels, depth, inverse);
    for (int64_t k = 0; k < depth; ++k)
      for (int l = 0; l < LANES; ++l) panels[k * LANES + l] *= inverse[l];
  }
}
// Packs the rows of one head as lanes, divided by their lengths where asked.
template <class T, int LANES>
void pack_rows(T* out, const void* in, const Strided& m, int64_t rows, int64_t depth, bool normalize) {
  pack<T, LANES>(out, in, m.dtype, m.row_stride, m.column_stride, rows, depth);
  if (normalize) normalize_panels<T, LANES>(out, rows, depth);
}

}  // namespace fastssl::cpu::FASTSSL_ISA

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
