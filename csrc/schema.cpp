// Every operator schema of the library. Raw operators take tensors, ints and floats only: strings and
// optional tensors cost microseconds each on their way through the stable ABI.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastssl, m) {
  m.def(
      "gram_loss_forward(Tensor student, Tensor teacher, int normalize, int remove, int wanted) -> (Tensor, "
      "Tensor)");
  m.def(
      "gram_loss_backward(Tensor grad, Tensor student, Tensor teacher, int normalize, int remove) -> "
      "Tensor");
  m.def("sample_tokens_forward(Tensor x, Tensor grid) -> Tensor");
  m.def("sample_tokens_backward(Tensor grad, Tensor x, Tensor grid, int wanted) -> (Tensor, Tensor)");
  m.def(
      "self_relation_forward(Tensor x, Tensor columns, int channel, int num_heads, float scale, int "
      "normalize, "
      "int symmetric) -> Tensor");
  m.def(
      "self_relation_backward(Tensor grad, Tensor relation, Tensor x, Tensor columns, int channel, int "
      "num_heads, "
      "float scale, int normalize, int symmetric, int wanted) -> (Tensor, Tensor)");
  m.def(
      "self_relation_loss_forward(Tensor student, Tensor teacher, Tensor student_columns, Tensor "
      "teacher_columns, int channel, int num_heads, float student_scale, float teacher_scale, int normalize, "
      "int symmetric, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "self_relation_loss_backward(Tensor weights, Tensor stats, Tensor student, Tensor teacher, Tensor "
      "student_columns, Tensor teacher_columns, int channel, int num_heads, float student_scale, float "
      "teacher_scale, int normalize, int symmetric, int wanted) -> (Tensor, Tensor)");
  m.def(
      "simpool_forward(Tensor x, Tensor wq, Tensor bq, Tensor wk, Tensor norm_weight, Tensor norm_bias, "
      "Tensor beta, int num_heads, float scale, float gamma, int channel_min, float eps, float norm_eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "simpool_backward(Tensor grad, Tensor grad_attention, Tensor rows, Tensor vectors, Tensor minimum, "
      "Tensor x, Tensor wq, Tensor bq, Tensor wk, Tensor norm_weight, Tensor norm_bias, Tensor beta, int "
      "num_heads, float scale, float gamma, int channel_min, float eps, float norm_eps, int wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "masked_attention_forward(Tensor q, Tensor k, Tensor v, Tensor keep, float scale) -> (Tensor, Tensor)");
  m.def(
      "masked_attention_backward(Tensor grad, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor keep, float "
      "scale) -> Tensor");
  m.def(
      "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, "
      "float scale) -> Tensor");
}
