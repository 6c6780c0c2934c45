// gram_loss on the CPU: registration, checks of what the raw operators are given, and the split over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <tuple>
#include <vector>

#include "cpu/common.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace fastssl::cpu {

// Whose negative similarities count as 0.
constexpr int kRemoveNone = 0, kRemoveTeacher = 1, kRemoveBoth = 2;

// Strips of rows that are worked on together: each panel of columns is read once for all of them.
constexpr int kGramGroup = 4;

// Rows of one band of the gradient: a whole number of every tile's columns, and nearly one of its rows.
constexpr int64_t kGramBand = 96;

// One call.
struct GramLoss {
  Strided student, teacher;
  int64_t batch = 0, rows = 0, student_depth = 0, teacher_depth = 0;
  bool normalize = false;
  double* sums = nullptr;  // parts of Σ (S − T)²
  bool wants_gradient = false;
  Strided grad_student;
  double weight = 0;  // of each (S − T)²
  // The bands of some images, from image `first` on.
  char* bands = nullptr;
  int64_t first = 0;

  int64_t bands_per_image() const { return ceil_div(rows, kGramBand); }
};

struct GramLossKernels {
  void (*images)(const GramLoss&, int64_t begin, int64_t end);
  void (*groups)(const GramLoss&, int64_t begin, int64_t end);
  int64_t group_rows;
  // The gradient, where not in one pass; see gram_loss_gradient.h.
  int64_t (*band_bytes)(const GramLoss&);
  void (*gradient_bands)(const GramLoss&, int64_t begin, int64_t end);
  void (*gradient_pairs)(const GramLoss&, int64_t round, int64_t begin, int64_t end);
  void (*gradient_store)(const GramLoss&, int64_t begin, int64_t end);
};

}  // namespace fastssl::cpu

#define FASTSSL_KERNEL "cpu/gram_loss.h"
#include "cpu/foreach_isa.h"

namespace fastssl::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

GramLoss describe(const Tensor& student, const Tensor& teacher, int64_t normalize, int64_t remove) {
  STD_TORCH_CHECK(student.dim() == 3 && teacher.dim() == 3, "gram_loss: tokens must be (B, N, C)");
  STD_TORCH_CHECK(teacher.size(0) == student.size(0) && teacher.size(1) == student.size(1),
                  "gram_loss: student and teacher must have the same batch and number of tokens");
  STD_TORCH_CHECK(kRemoveNone <= remove && remove <= kRemoveBoth, "gram_loss: remove must be 0, 1 or 2");
  GramLoss op;
  op.student = heads_of(student, false, 1);
  op.teacher = heads_of(teacher, false, 1);
  op.batch = student.size(0);
  op.rows = student.size(1);
  op.student_depth = student.size(2);
  op.teacher_depth = teacher.size(2);
  op.normalize = normalize != 0;
  return op;
}

bool in_double(const Tensor& student, const Tensor& teacher) {
  return dtype_of(student) == Dtype::kDouble || dtype_of(teacher) == Dtype::kDouble;
}

double count_of(const GramLoss& op) {
  return static_cast<double>(op.batch) * static_cast<double>(op.rows) * static_cast<double>(op.rows);
}

// Whether an image's matrix stays in a core's second-level cache, and there are images for several cores. By
// the shape alone: the two ways round differently, and the number of threads may change no bit.
bool in_one_pass(const GramLoss& op) { return op.rows * op.rows <= int64_t{160} << 10 && op.batch >= 8; }

// The gradient of all images, some at a time: as many as give each thread several pairs of bands per round.
void run_gradient(GramLoss op, const GramLossKernels& kernels) {
  const int64_t bands = op.bands_per_image(), pairs = bands / 2, rounds = bands - 1 + bands % 2;
  const int64_t wanted = 4 * int64_t{torch::stable::get_num_threads()};
  const int64_t at_once = std::min(op.batch, ceil_div(wanted, std::max<int64_t>(pairs, 1)));
  const int64_t bytes = at_once * bands * kernels.band_bytes(op);
  const std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(Scratch::kAlignment, static_cast<size_t>(bytes)), std::free);
  if (memory == nullptr) throw std::bad_alloc();
  op.bands = static_cast<char*>(memory.get());
  for (; op.first < op.batch; op.first += at_once) {
    const int64_t images = std::min(at_once, op.batch - op.first);
    const auto run = [&](int64_t items, auto&& kernel) { torch::stable::parallel_for(0, items, 1, kernel); };
    run(images * bands, [&](int64_t begin, int64_t end) { kernels.gradient_bands(op, begin, end); });
    for (int64_t round = 0; round < rounds; ++round)
      run(images * pairs, [&](int64_t begin, int64_t end) { kernels.gradient_pairs(op, round, begin, end); });
    run(images * bands, [&](int64_t begin, int64_t end) { kernels.gradient_store(op, begin, end); });
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, int64_t normalize,
                                   int64_t remove, int64_t wanted) {
  GramLoss op = describe(student, teacher, normalize, remove);
  const bool doubles = in_double(student, teacher);
  Tensor loss = torch::stable::new_empty(student, {}, doubles ? ScalarType::Double : ScalarType::Float);
  Tensor grad = wanted ? torch::stable::empty_like(student) : torch::stable::new_empty(student, {0});
  double sum = 0;
  if (op.batch * op.rows == 0) {
    if (wanted) torch::stable::zero_(grad);
  } else {
    op.wants_gradient = wanted != 0;
    if (wanted) op.grad_student = heads_of(grad, false, 1);
    op.weight = 1 / count_of(op);
    const GramLossKernels& kernels = FASTSSL_FOR_ISA(gram_kernels(doubles, remove));
    const bool one_pass = in_one_pass(op);
    std::vector<double> sums(one_pass ? op.batch : op.batch * ceil_div(op.rows, kernels.group_rows));
    op.sums = sums.data();
    const auto kernel = one_pass ? kernels.images : kernels.groups;
    torch::stable::parallel_for(0, static_cast<int64_t>(sums.size()), 1,
                                [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    for (const double part : sums) sum += part;
    sum *= op.weight;
    if (wanted && !one_pass) run_gradient(op, kernels);
  }
  if (doubles) {
    *static_cast<double*>(loss.data_ptr()) = sum;
  } else {
    *static_cast<float*>(loss.data_ptr()) = static_cast<float>(sum);
  }
  return {loss, grad};
}

Tensor backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, int64_t normalize,
                int64_t remove) {
  GramLoss op = describe(student, teacher, normalize, remove);
  const bool doubles = in_double(student, teacher);
  STD_TORCH_CHECK(grad.dim() == 0 && grad.scalar_type() == (doubles ? ScalarType::Double : ScalarType::Float),
                  "gram_loss: grad must be a scalar in the loss's dtype");
  Tensor result = torch::stable::empty_like(student);
  if (op.batch * op.rows == 0) {
    torch::stable::zero_(result);
    return result;
  }
  const double upstream = doubles ? *static_cast<const double*>(grad.data_ptr())
                                  : double{*static_cast<const float*>(grad.data_ptr())};
  op.grad_student = heads_of(result, false, 1);
  op.weight = upstream / count_of(op);
  run_gradient(op, FASTSSL_FOR_ISA(gram_kernels(doubles, remove)));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("gram_loss_forward", TORCH_BOX(&forward));
  m.impl("gram_loss_backward", TORCH_BOX(&backward));
}

}  // namespace fastssl::cpu
