// The code paths of the CPU kernels: each kernel is compiled for several instruction sets, and one is chosen
// at run time, so that a wheel runs anywhere.
#pragma once

namespace fastssl::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kIsaCount = 3;

const char* isa_name(Isa isa);
// Whether this library holds the code path at all (x86-64 builds hold all three).
bool isa_is_built(Isa isa);
// Whether this processor runs it.
bool isa_is_supported(Isa isa);
// The processor features that decide, and whether they are here. The list ends with a null name.
struct Feature {
  const char* name;
  bool here;
};
const Feature* features();
// The path in use: the widest that is built and supported, unless set_isa chose another.
Isa current_isa();
// Chooses a path; false where it is not built or not supported, and nothing changes.
bool set_isa(Isa isa);

}  // namespace fastssl::cpu

// A call into the kernels of the path in use, for files that include cpu/foreach_isa.h.
#if defined(__x86_64__)
#define FASTSSL_FOR_ISA(call) \
  (current_isa() == Isa::kAvx512 ? avx512::call : current_isa() == Isa::kAvx2 ? avx2::call : portable::call)
#else
#define FASTSSL_FOR_ISA(call) (portable::call)
#endif
