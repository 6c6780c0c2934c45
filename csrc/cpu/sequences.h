// What masked_attention and packed_attention on the CPU share: sequences of tokens, and the run over them.
#pragma once

#include <vector>

#include "cpu/common.h"

namespace fastssl::cpu {

// Tokens of one sequence: `count` of them in `image`, numbers [begin, begin + count) of it, or what
// Attention's index has there.
struct Sequence {
  int64_t image, begin, count;
};

// One call. Rows of the tensors are tokens, of one head.
struct Attention {
  Strided q{}, k{}, v{};
  int64_t heads = 0, depth = 0;
  double scale = 0;
  bool streams = false;  // results are written past the caches
  std::vector<Sequence> sequences;
  std::vector<int64_t> index;                    // empty: tokens follow each other
  std::vector<int64_t> dropped;                  // tokens in no sequence: image · tokens + token
  Strided out{}, lse{};                          // forward
  Strided grad{}, grad_q{}, grad_k{}, grad_v{};  // backward
};

// Both compute every (sequence, head) on one thread.
void attention_forward(const Attention& op);
void attention_backward(const Attention& op);

}  // namespace fastssl::cpu
