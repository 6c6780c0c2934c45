// Detects the instruction sets of this processor and keeps the choice.
#include "cpu/isa.h"

#include <atomic>

namespace fastssl::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool isa_is_built(Isa isa) {
#if defined(__x86_64__)
  return true;
#else
  return isa == Isa::kPortable;
#endif
}

const Feature* features() {
#if defined(__x86_64__)
  // The same sets as the target lines of foreach_isa.h; __builtin_cpu_supports takes literals alone.
  __builtin_cpu_init();
  static const Feature list[] = {{"avx2", __builtin_cpu_supports("avx2") != 0},
                                 {"fma", __builtin_cpu_supports("fma") != 0},
                                 {"avx512f", __builtin_cpu_supports("avx512f") != 0},
                                 {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
                                 {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
                                 {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
                                 {nullptr, false}};
#else
  static const Feature list[] = {{nullptr, false}};
#endif
  return list;
}

bool isa_is_supported(Isa isa) {
  const int wanted = isa == Isa::kPortable ? 0 : isa == Isa::kAvx2 ? 2 : 6;  // the first so many features
  int here = 0;
  for (const Feature* f = features(); f->name != nullptr && f->here; ++f) ++here;
  return here >= wanted;
}

namespace {

Isa widest() {
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_is_built(static_cast<Isa>(i)) && isa_is_supported(static_cast<Isa>(i)))
      return static_cast<Isa>(i);
  }
  return Isa::kPortable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{widest()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
  if (!isa_is_built(isa) || !isa_is_supported(isa)) return false;
  chosen().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace fastssl::cpu
