// pybind11 module fastssl._C: the facts of this build. Importing it loads the operators.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "fastssl_build_facts.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastssl's compiled library: build facts; the operators live in torch.ops.fastssl";
  m.def("build_facts", [] {
    py::dict facts;
#if defined(__clang__)
    facts["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    facts["compiler"] = "g++ " __VERSION__;
#else
    facts["compiler"] = "unknown";
#endif
    facts["stable_abi"] = FASTSSL_STABLE_ABI;
    facts["cuda_version"] = FASTSSL_CUDA_VERSION_TEXT;
    facts["cuda_architectures"] = FASTSSL_CUDA_ARCHITECTURES;
    facts["no_cuda_reason"] = FASTSSL_NO_CUDA_REASON;
    py::list paths;
    for (int i = 0; i < fastssl::cpu::kIsaCount; ++i) {
      if (fastssl::cpu::isa_is_built(static_cast<fastssl::cpu::Isa>(i)))
        paths.append(fastssl::cpu::isa_name(static_cast<fastssl::cpu::Isa>(i)));
    }
    facts["cpu_paths"] = paths;
    facts["cpu_path"] = fastssl::cpu::isa_name(fastssl::cpu::current_isa());
    return facts;
  });
}
