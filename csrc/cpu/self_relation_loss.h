// self_relation_loss on the CPU: one row of it, and the table of kernels that self_relation_loss.cpp calls.
// Included once per instruction set by foreach_isa.h.
//
// S = s_s X Xcᵀ and T = s_t Y Ycᵀ are the student's and the teacher's logits, P and Q their softmax by rows:
//   loss_i = log Σ_j exp S_ij − Σ_j Q_ij S_ij,   dS_ij = w_i (P_ij − Q_ij).
// Where a row is nearly one-hot, both differences cancel. So every row has a pivot p, mostly its largest
// element:
//   loss_i = log1p(Σ_{j≠p} exp(S_ij − S_ip)) + Σ_j Q_ij (S_ip − S_ij),   dS_ip = −Σ_{j≠p} dS_ij.

#include "cpu/lengths.h"
#include "cpu/gradient_strips.h"

namespace fastssl::cpu::FASTSSL_ISA {

constexpr double kLog2e = 1.4426950408889634;

// The softmax of one row of products s, as powers of two over that of its largest element, the pivot.
template <class T>
struct SoftRow {
  int64_t pivot;
  T top;   // the pivot's product, with the sign of the factor
  T rest;  // Σ of the powers of all others; the pivot's is 1, so that the row's sum is 1 + rest
};

// powers[j] = 2^(factor·s_j − factor·s_pivot), but zero at the pivot and from n to the end of the last
// vector.
template <class T>
FASTSSL_INLINE SoftRow<T> soft_row(const T* s, T* powers, int64_t n, T factor) {
  constexpr int W = Simd<T>::kWidth;
  using I = typename Simd<T>::I;
  const int64_t whole = (n - 1) / W * W;
  const T sign = factor < 0 ? T(-1) : T(1), size = std::abs(factor),
          lowest = -std::numeric_limits<T>::infinity();
  Vec<T> best = broadcast<T>(lowest);
  I where{};
  for (int64_t j = 0; j <= whole; j += W) {
    Vec<T> here = load<T>(s + j) * sign;
    if (j == whole) here = keep_lanes<T>(here, n - whole, lowest);
    const auto higher = here > best;
    best = higher ? here : best;
    where = higher ? I{} + static_cast<decltype(where[0] + 0)>(j) : where;
  }
  SoftRow<T> row{0, max_lanes<T>(best), T(0)};
  for (int l = 0; l < W; ++l) {
    if (best[l] == row.top) {
      row.pivot = where[l] + l;
      break;
    }
  }
  Vec<T> total{};
  for (int64_t j = 0; j <= whole; j += W) {
    // The difference first: it is exact near the pivot, however large the logits are.
    Vec<T> power = exp2((load<T>(s + j) * sign - row.top) * size);
    if (j == whole) power = keep_lanes<T>(power, n - whole, T{0});
    if (j == row.pivot / W * W && power[row.pivot % W] == T(1))
      power[row.pivot % W] = T(0);  // else NaN, which stays
    store<T>(powers + j, power);
    total += power;
  }
  row.rest = sum_lanes<T>(total);
  return row;
}

// One row of student and teacher. Its pivot is the student's; the teacher's powers are split at the same
// place.
template <class T>
struct RowPair {
  SoftRow<T> student, teacher;
  T loss;
  T teacher_own, teacher_rest;  // Q of the pivot, and of all others together, times the sum of the powers

  // dS of the pivot: minus the sum of all others where those are the smaller part of the row, since their
  // rounding then is the smaller one, or the plain difference.
  FASTSSL_INLINE T gradient() const {
    const T s = 1 / (1 + student.rest), t = 1 / (1 + teacher.rest);
    const T rest = student.rest * s, other_rest = teacher_rest * t;
    return rest + other_rest < 1 ? other_rest - rest : s - teacher_own * t;
  }
};
// e and q: the powers of s and t. They may not be s and t.
template <class T>
FASTSSL_INLINE RowPair<T> row_pair(const T* s, const T* t, T* e, T* q, int64_t n, T student_factor,
                                   T teacher_factor) {
  constexpr int W = Simd<T>::kWidth;
  RowPair<T> row;
  row.teacher = soft_row<T>(t, q, n, teacher_factor);
  row.student = soft_row<T>(s, e, n, student_factor);
  const T sign = student_factor < 0 ? T(-1) : T(1), size = std::abs(student_factor) * T(1 / kLog2e);
  const T top = row.student.top;
  const int64_t whole = (n - 1) / W * W;
  Vec<T> apart{};
  for (int64_t j = 0; j < whole; j += W) apart += load<T>(q + j) * (top - load<T>(s + j) * sign);
  apart += load<T>(q + whole) * keep_lanes<T>(top - load<T>(s + whole) * sign, n - whole, T{0});
  const T sum = sum_lanes<T>(apart) + (top - s[row.teacher.pivot] * sign);
  row.loss = std::log1p(row.student.rest) + size * sum / (1 + row.teacher.rest);
  const bool same = row.student.pivot == row.teacher.pivot;
  row.teacher_own = same ? T(1) : q[row.student.pivot];
  row.teacher_rest = same ? row.teacher.rest : 1 + (row.teacher.rest - row.teacher_own);
  return row;
}

// dS of that row, times `weight`; zero from n to the end of the last vector. `ds` may be e.
template <class T>
FASTSSL_INLINE void gradient_row(const RowPair<T>& row, const T* e, T* q, T* ds, int64_t n, T weight) {
  constexpr int W = Simd<T>::kWidth;
  const T of_student = weight / (1 + row.student.rest), of_teacher = weight / (1 + row.teacher.rest);
  q[row.teacher.pivot] = T(1);
  for (int64_t j = 0; j < n; j += W)
    store<T>(ds + j, load<T>(e + j) * of_student - load<T>(q + j) * of_teacher);
  ds[row.student.pivot] = weight * row.gradient();
}

// What the backward needs of a row, beside the tokens; op.stats has one matrix of rows for each.
template <class T>
struct KeptRow {
  T student_top, student_sum, teacher_top, teacher_sum;  // P_ij = 2^(f·(s_ij − top) − sum)
  T pivot, pivot_gradient;                               // its index, exact up to 2^24 in float, and dS there
};
constexpr int kKeptNumbers = 6;

template <class T>
FASTSSL_INLINE void keep_row(const SelfRelationLoss& op, int64_t item, T loss, const KeptRow<T>& kept) {
  const int64_t all = op.batch * op.heads * op.rows;
  const T numbers[kKeptNumbers] = {kept.student_top, kept.student_sum, kept.teacher_top,
                                   kept.teacher_sum, kept.pivot,       kept.pivot_gradient};
  static_cast<T*>(op.loss)[item] = loss;
  for (int i = 0; i < kKeptNumbers; ++i) static_cast<T*>(op.stats)[item + i * all] = numbers[i];
}
template <class T>
FASTSSL_INLINE void keep_row(const SelfRelationLoss& op, int64_t item, const RowPair<T>& row) {
  const T student_sum = T(kLog2e) * std::log1p(row.student.rest);
  const T teacher_sum = T(kLog2e) * std::log1p(row.teacher.rest);
  keep_row<T>(op, item, row.loss,
              {row.student.top, student_sum, row.teacher.top, teacher_sum, static_cast<T>(row.student.pivot),
               row.gradient()});
}

}  // namespace fastssl::cpu::FASTSSL_ISA

#include "cpu/self_relation_loss_heads.h"
#include "cpu/self_relation_loss_strips.h"

namespace fastssl::cpu::FASTSSL_ISA {

template <class T>
constexpr SelfRelationLossKernels kLossKernels{loss_heads<T>, loss_strips<T>, loss_gradient_strips<T>,
                                               kTileRows};

inline const SelfRelationLossKernels& loss_kernels(bool in_double) {
  return in_double ? kLossKernels<double> : kLossKernels<float>;
}

}  // namespace fastssl::cpu::FASTSSL_ISA
