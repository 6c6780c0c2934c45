// simpool's CUDA kernels on the CPU, launched in the very sequence of csrc/cuda/simpool.cu, behind C
// functions for ctypes (tests/test_cuda_simpool.py).
#include "cuda_on_cpu.h"

#include "cuda/simpool_launches.cuh"

namespace sp = fastssl::cuda::simpool;
using cuda_on_cpu::Guarded;

namespace {

// A tensor as Python sees it: its storage, where in it the first element lies, and the storage type.
struct Array {
  void* storage;
  int64_t bytes, offset;
  int64_t type;  // as fastssl::cuda::Storage
  int64_t elements;
  int64_t sizes[3], strides[3];
};

struct Numbers {
  int64_t heads, channel_minimum, multiprocessors, order;
  double scale, gamma, eps, norm_eps;
};

// A copy of the tensor in guarded memory; `back` returns what kernels wrote, or says that they should not
// have.
struct Copy {
  Copy(const char* name, const Array* array)
      : array(array), memory(std::make_unique<Guarded>(name, array->storage, array->bytes)) {}
  void* first() const {
    return array->elements == 0 ? nullptr : static_cast<char*>(memory->data()) + array->offset;
  }
  fastssl::cuda::Storage storage() const { return static_cast<fastssl::cuda::Storage>(array->type); }
  sp::Values values() const { return {first(), storage(), array->strides[0]}; }
  sp::Result result() const { return {first(), storage(), array->strides[0]}; }
  sp::Matrix matrix() const { return {first(), storage(), array->strides[0], array->strides[1]}; }
  sp::Strides strides() const { return {array->strides[0], array->strides[1], array->strides[2]}; }
  float* floats() const { return static_cast<float*>(first()); }
  void back() const { memcpy(array->storage, memory->data(), array->bytes); }
  void unchanged(std::string& error) const {
    if (error.empty() && memcmp(array->storage, memory->data(), array->bytes) != 0)
      error = "an input was written to: " + memory->name();
  }
  const Array* array;
  std::unique_ptr<Guarded> memory;
};

// Every part of the workspace ends at a page of its own, and is NaN.
struct GuardedWorkspace {
  std::vector<std::unique_ptr<Guarded>> parts;
  float* take(int64_t count) {
    parts.push_back(std::make_unique<Guarded>("workspace part " + std::to_string(parts.size()), nullptr,
                                              count * sizeof(float)));
    return static_cast<float*>(parts.back()->data());
  }
};

struct Launcher {
  int order;
  std::string error;
  int launches = 0;
  void zero(void* memory, size_t bytes) { memset(memory, 0, bytes); }
  template <class Kernel, class Argument>
  void run(const char* name, Kernel kernel, int64_t blocks, int threads, size_t shared,
           const Argument& argument) {
    if (!error.empty()) return;
    ++launches;
    error = cuda_on_cpu::launch(blocks, threads, shared, order, [&] { kernel(argument); });
    if (!error.empty()) error = std::string(name) + ": " + error;
  }
};

template <class Call>
void describe(Call& p, const Array* x, const Numbers& n) {
  p.shape = sp::split(x->sizes[0], x->sizes[1], x->sizes[2], n.heads, x->type == 0 ? 4 : 2, n.gamma != 0,
                      n.multiprocessors);
  p.scale = n.scale, p.gamma = n.gamma, p.eps = n.eps;
  p.channel_minimum = n.channel_minimum;
}

}  // namespace

extern "C" {

// inputs: x, wq, bq, wk, norm_weight, norm_bias, beta. outputs: out, attention, rows, vectors, minimum.
const char* forward(const Array* inputs, const Array* outputs, const Numbers* n) {
  const Copy x("x", inputs), wq("wq", inputs + 1), bq("bq", inputs + 2), wk("wk", inputs + 3);
  const Copy weight("norm_weight", inputs + 4), bias("norm_bias", inputs + 5), beta("beta", inputs + 6);
  const Copy out("out", outputs), attention("attention", outputs + 1), rows("rows", outputs + 2);
  const Copy vectors("vectors", outputs + 3), minimum("minimum", outputs + 4);
  sp::Forward p;
  describe(p, inputs, *n);
  p.norm_eps = n->norm_eps;
  p.x = x.first(), p.strides = x.strides();
  p.norm_weight = weight.values(), p.norm_bias = bias.values(), p.beta = beta.values();
  p.out = out.first(), p.attention = attention.first();
  p.rows = rows.floats(), p.vectors = vectors.floats(), p.minimum = minimum.floats();
  GuardedWorkspace space;
  sp::lay_out(space, p, n->gamma != 0);
  Launcher launcher{static_cast<int>(n->order), "", 0};
  sp::with_types(x.storage(), n->gamma != 0, [&](auto x_value, auto with) {
    sp::run_forward<decltype(x_value), decltype(with)::value>(launcher, p, wq.matrix(), wk.matrix(),
                                                              bq.values());
  });
  for (const Copy* input : {&x, &wq, &bq, &wk, &weight, &bias, &beta}) input->unchanged(launcher.error);
  for (const Copy* output : {&out, &attention, &rows, &vectors, &minimum}) output->back();
  static std::string error;
  error = launcher.error;
  return error.c_str();
}

// inputs: x, wq, bq, wk, norm_weight, norm_bias, beta, grad, grad_attention, rows, vectors, minimum.
// outputs: the gradients of the first seven. wanted: 1 that of x, 2 the others.
const char* backward(const Array* inputs, const Array* outputs, const Numbers* n, int wanted, int* launches) {
  const Copy x("x", inputs), wq("wq", inputs + 1), bq("bq", inputs + 2), wk("wk", inputs + 3);
  const Copy weight("norm_weight", inputs + 4), bias("norm_bias", inputs + 5), beta("beta", inputs + 6);
  const Copy grad("grad", inputs + 7), grad_attention("grad_attention", inputs + 8);
  const Copy rows("rows", inputs + 9), vectors("vectors", inputs + 10), minimum("minimum", inputs + 11);
  const Copy dx("grad_x", outputs), dwq("grad_wq", outputs + 1), dbq("grad_bq", outputs + 2);
  const Copy dwk("grad_wk", outputs + 3), dweight("grad_norm_weight", outputs + 4);
  const Copy dbias("grad_norm_bias", outputs + 5), dbeta("grad_beta", outputs + 6);
  sp::Backward p;
  describe(p, inputs, *n);
  p.x = x.first(), p.strides = x.strides();
  p.grad_x = dx.first(), p.grad_strides = dx.strides();
  p.grad = grad.first(), p.grad_image = grad.array->strides[0], p.grad_channel = grad.array->strides[1];
  p.grad_attention = grad_attention.first(), p.attention_strides = grad_attention.strides();
  p.rows = rows.floats(), p.vectors = vectors.floats(), p.minimum = minimum.floats();
  p.norm_weight = weight.values(), p.norm_bias = bias.values();
  p.grad_norm_weight = dweight.result(), p.grad_norm_bias = dbias.result();
  p.grad_bq = dbq.result(), p.grad_beta = dbeta.result();
  GuardedWorkspace space;
  sp::lay_out(space, p, n->gamma != 0);
  Launcher launcher{static_cast<int>(n->order), "", 0};
  sp::with_types(x.storage(), n->gamma != 0, [&](auto x_value, auto with) {
    sp::run_backward<decltype(x_value), decltype(with)::value>(
        launcher, p, wq.matrix(), wk.matrix(), dwq.matrix(), dwk.matrix(), wanted & 1, wanted & 2);
  });
  for (const Copy* input :
       {&x, &wq, &bq, &wk, &weight, &bias, &beta, &grad, &grad_attention, &rows, &vectors, &minimum}) {
    input->unchanged(launcher.error);
  }
  for (const Copy* output : {&dx, &dwq, &dbq, &dwk, &dweight, &dbias, &dbeta}) output->back();
  *launches = launcher.launches;
  static std::string error;
  error = launcher.error;
  return error.c_str();
}

// tile, chunk, chunks, and the shared memory of the kernel that takes most.
void split(int64_t images, int64_t tokens, int64_t channels, int64_t heads, int element_bytes, int power,
           int multiprocessors, int64_t* found) {
  const sp::Shape s = sp::split(images, tokens, channels, heads, element_bytes, power, multiprocessors);
  found[0] = s.tile, found[1] = s.chunk, found[2] = s.chunks;
  found[3] = s.tile == 0 ? -1 : sp::largest_bytes(s.tile, channels, heads, element_bytes, power);
}

int max_channels() { return sp::kMaxChannels; }
int max_heads() { return sp::kMaxHeads; }

// A product on its own: operands and result are matrices (batch, row, column).
const char* product(const Array* left, const Array* right, const Array* bias, const Array* out, int order) {
  const Copy a("left", left), b("right", right), c("bias", bias), d("out", out);
  const auto operand = [](const Copy& of) -> fastssl::cuda::products::Operand {
    const int64_t* strides = of.array->strides;
    return {of.first(), of.storage(), strides[0], strides[1], strides[2]};
  };
  fastssl::cuda::products::Product p;
  p.batches = left->sizes[0], p.rows = left->sizes[1], p.depth = left->sizes[2], p.columns = right->sizes[2];
  p.left = operand(a), p.right = operand(b), p.bias = operand(c);
  p.out = {d.first(), d.storage(), out->strides[0], out->strides[1], out->strides[2]};
  Launcher launcher{order, "", 0};
  sp::multiply(launcher, "product", p);
  d.back();
  static std::string error;
  error = launcher.error;
  return error.c_str();
}
}
