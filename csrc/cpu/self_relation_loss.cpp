// self_relation_loss on the CPU: registration, checks of what the raw operators are given, and the split over
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

// Rows and columns of the student or of the teacher, of depth K for every (batch, head).
struct LossSide {
  Strided rows, columns;
  int64_t depth = 0;
  double scale = 0;
};

// One call. loss: (batch, heads, rows), stats: (6, batch, heads, rows), contiguous, both of the type of
// arithmetic.
struct SelfRelationLoss {
  LossSide student, teacher;
  int64_t batch = 0, heads = 0, rows = 0, columns = 0;
  bool normalize = false, symmetric = false;  // symmetric: the columns are the rows
  void *loss = nullptr, *stats = nullptr;
  // Gradients.
  bool wants_student = false, wants_columns = false;
  Strided grad_student, grad_columns;
  double weight = 0;  // of every row, in one pass
  Strided weights;    // else of each row
};

struct SelfRelationLossKernels {
  void (*heads)(const SelfRelationLoss&, int64_t begin, int64_t end);
  void (*strips)(const SelfRelationLoss&, int64_t begin, int64_t end);
  void (*gradient_strips)(const SelfRelationLoss&, bool of_columns, int64_t begin, int64_t end);
  int64_t strip_rows;
};

}  // namespace fastssl::cpu

#define FASTSSL_KERNEL "cpu/self_relation_loss.h"
#include "cpu/foreach_isa.h"

namespace fastssl::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

LossSide side_of(const Tensor& rows, const Tensor& columns, bool channel, int64_t num_heads, double scale) {
  STD_TORCH_CHECK(rows.dim() == 3 && columns.dim() == 3, "self_relation_loss: tokens must be (B, N, C)");
  STD_TORCH_CHECK(num_heads > 0 && rows.size(2) % num_heads == 0,
                  "self_relation_loss: num_heads must divide the channels");
  STD_TORCH_CHECK(columns.size(0) == rows.size(0) && columns.size(2) == rows.size(2),
                  "self_relation_loss: columns must have the batch and channels of their rows");
  STD_TORCH_CHECK(!channel || columns.size(1) == rows.size(1),
                  "self_relation_loss: columns must have the tokens of their rows");
  const int64_t depth = channel ? rows.size(1) : rows.size(2) / num_heads;
  return {heads_of(rows, channel, num_heads), heads_of(columns, channel, num_heads), depth, scale};
}

SelfRelationLoss describe(const Tensor& student, const Tensor& teacher, const Tensor& student_columns,
                          const Tensor& teacher_columns, int64_t channel, int64_t num_heads,
                          double student_scale, double teacher_scale, int64_t normalize, int64_t symmetric) {
  SelfRelationLoss op;
  op.student = side_of(student, student_columns, channel, num_heads, student_scale);
  op.teacher = side_of(teacher, teacher_columns, channel, num_heads, teacher_scale);
  const int64_t rows = channel ? 2 : 1;
  STD_TORCH_CHECK(teacher.size(0) == student.size(0) && teacher.size(rows) == student.size(rows) &&
                      teacher_columns.size(rows) == student_columns.size(rows),
                  "self_relation_loss: student and teacher must have the same batch, rows and columns");
  STD_TORCH_CHECK(
      !symmetric || channel ||
          (student_columns.size(1) == student.size(1) && teacher_columns.size(1) == teacher.size(1)),
      "self_relation_loss: without columns they must be the tokens themselves");
  op.batch = student.size(0);
  op.heads = num_heads;
  op.rows = channel ? student.size(2) / num_heads : student.size(1);
  op.columns = channel ? op.rows : student_columns.size(1);
  op.normalize = normalize != 0;
  op.symmetric = symmetric != 0;
  if (op.symmetric) {
    op.student.columns = op.student.rows;
    op.teacher.columns = op.teacher.rows;
  }
  return op;
}

ScalarType arithmetic_of(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d) {
  for (const Tensor& t : {a, b, c, d})
    if (dtype_of(t) == Dtype::kDouble) return ScalarType::Double;
  return ScalarType::Float;
}

// Whether a head's matrix stays in a core's second-level cache, and there are heads for several cores. By the
// shape alone: the two ways round differently, and the number of threads may change no bit.
bool in_one_pass(const SelfRelationLoss& op) {
  return op.rows * op.columns <= int64_t{160} << 10 && op.batch * op.heads >= 8;
}

std::tuple<Tensor, Tensor> new_gradients(SelfRelationLoss& op, const Tensor& student,
                                         const Tensor& student_columns, int64_t channel, int64_t wanted) {
  STD_TORCH_CHECK(!(op.symmetric && (wanted & 2)),
                  "self_relation_loss: without columns they have no gradient");
  op.wants_student = wanted & 1;
  op.wants_columns = wanted & 2;
  Tensor grad_student =
      op.wants_student ? torch::stable::empty_like(student) : torch::stable::new_empty(student, {0});
  Tensor grad_columns = op.wants_columns ? torch::stable::empty_like(student_columns)
                                         : torch::stable::new_empty(student_columns, {0});
  if (op.wants_student) op.grad_student = heads_of(grad_student, channel, op.heads);
  if (op.wants_columns) op.grad_columns = heads_of(grad_columns, channel, op.heads);
  return {grad_student, grad_columns};
}

void run_gradient_strips(const SelfRelationLoss& op, const SelfRelationLossKernels& kernels) {
  for (const bool of_columns : {false, true}) {
    if (!(of_columns ? op.wants_columns : op.wants_student)) continue;
    const int64_t strips =
        op.batch * op.heads * ceil_div(of_columns ? op.columns : op.rows, kernels.strip_rows);
    torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      kernels.gradient_strips(op, of_columns, begin, end);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher,
                                                   const Tensor& student_columns,
                                                   const Tensor& teacher_columns, int64_t channel,
                                                   int64_t num_heads, double student_scale,
                                                   double teacher_scale, int64_t normalize, int64_t symmetric,
                                                   int64_t wanted) {
  SelfRelationLoss op = describe(student, teacher, student_columns, teacher_columns, channel, num_heads,
                                 student_scale, teacher_scale, normalize, symmetric);
  const ScalarType type = arithmetic_of(student, teacher, student_columns, teacher_columns);
  Tensor loss = torch::stable::new_empty(student, {op.batch, op.heads, op.rows}, type);
  Tensor stats = torch::stable::new_empty(student, {6, op.batch, op.heads, op.rows}, type);
  auto [grad_student, grad_columns] = new_gradients(op, student, student_columns, channel, wanted);
  const int64_t heads = op.batch * op.heads, items = heads * op.rows;
  if (items == 0) {
    if (op.wants_student) torch::stable::zero_(grad_student);
    if (op.wants_columns) torch::stable::zero_(grad_columns);
    return {loss, stats, grad_student, grad_columns};
  }
  op.loss = loss.data_ptr();
  op.stats = stats.data_ptr();
  op.weight = 1.0 / static_cast<double>(items);
  const SelfRelationLossKernels& kernels = FASTSSL_FOR_ISA(loss_kernels(type == ScalarType::Double));
  if (in_one_pass(op)) {
    torch::stable::parallel_for(0, heads, 1,
                                [&](int64_t begin, int64_t end) { kernels.heads(op, begin, end); });
    return {loss, stats, grad_student, grad_columns};
  }
  const int64_t strips = heads * ceil_div(op.rows, kernels.strip_rows);
  torch::stable::parallel_for(0, strips, 1,
                              [&](int64_t begin, int64_t end) { kernels.strips(op, begin, end); });
  const double as_double = op.weight;
  const float as_float = static_cast<float>(op.weight);
  const bool in_double = type == ScalarType::Double;
  op.weights = {
      in_double ? static_cast<void*>(const_cast<double*>(&as_double)) : const_cast<float*>(&as_float),
      in_double ? Dtype::kDouble : Dtype::kFloat,
      0,
      0,
      0,
      0};
  run_gradient_strips(op, kernels);
  return {loss, stats, grad_student, grad_columns};
}

std::tuple<Tensor, Tensor> backward(const Tensor& weights, const Tensor& stats, const Tensor& student,
                                    const Tensor& teacher, const Tensor& student_columns,
                                    const Tensor& teacher_columns, int64_t channel, int64_t num_heads,
                                    double student_scale, double teacher_scale, int64_t normalize,
                                    int64_t symmetric, int64_t wanted) {
  SelfRelationLoss op = describe(student, teacher, student_columns, teacher_columns, channel, num_heads,
                                 student_scale, teacher_scale, normalize, symmetric);
  const ScalarType type = arithmetic_of(student, teacher, student_columns, teacher_columns);
  STD_TORCH_CHECK(weights.dim() == 3 && weights.size(0) == op.batch && weights.size(1) == op.heads &&
                      weights.size(2) == op.rows && weights.scalar_type() == type,
                  "self_relation_loss: weights must be (B, H, R) in the loss's dtype");
  STD_TORCH_CHECK(stats.is_contiguous() && stats.numel() == 6 * op.batch * op.heads * op.rows &&
                      stats.scalar_type() == type,
                  "self_relation_loss: stats must be those of the forward");
  auto [grad_student, grad_columns] = new_gradients(op, student, student_columns, channel, wanted);
  if (op.batch * op.rows * op.columns == 0) {
    if (op.wants_student) torch::stable::zero_(grad_student);
    if (op.wants_columns) torch::stable::zero_(grad_columns);
    return {grad_student, grad_columns};
  }
  op.stats = stats.data_ptr();
  op.weights = {weights.data_ptr(), dtype_of(weights), weights.stride(0),
                weights.stride(1),  weights.stride(2), 0};
  run_gradient_strips(op, FASTSSL_FOR_ISA(loss_kernels(type == ScalarType::Double)));
  return {grad_student, grad_columns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("self_relation_loss_forward", TORCH_BOX(&forward));
  m.impl("self_relation_loss_backward", TORCH_BOX(&backward));
}

}  // namespace fastssl::cpu
