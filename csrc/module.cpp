// pybind11 module fastssl._C: the facts of this build. Importing it loads the operators.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "fastssl_build_facts.h"

namespace py = pybind11;

namespace {

using fastssl::cpu::Isa;

py::list cpu_paths(bool (*holds)(Isa)) {
  py::list names;
  for (int i = 0; i < fastssl::cpu::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (fastssl::cpu::isa_is_built(isa) && holds(isa)) names.append(fastssl::cpu::isa_name(isa));
  }
  return names;
}

py::dict cpu_features() {
  py::dict result;
  for (const fastssl::cpu::Feature* f = fastssl::cpu::features(); f->name != nullptr; ++f)
    result[f->name] = f->here;
  return result;
}

bool use_cpu_path(const std::string& name) {
  for (int i = 0; i < fastssl::cpu::kIsaCount; ++i) {
    if (name == fastssl::cpu::isa_name(static_cast<Isa>(i)))
      return fastssl::cpu::set_isa(static_cast<Isa>(i));
  }
  return false;
}

py::dict build_facts() {
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
  facts["cpu_paths"] = cpu_paths(fastssl::cpu::isa_is_built);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "fastssl's compiled library: build facts and CPU code paths; the operators live in torch.ops.fastssl";
  m.def("build_facts", &build_facts,
        "compiler, stable-ABI target, CUDA or why none, CPU code paths in the library");
  m.def(
      "supported_cpu_paths", [] { return cpu_paths(fastssl::cpu::isa_is_supported); },
      "the CPU code paths of the library that this processor runs");
  m.def(
      "cpu_path", [] { return fastssl::cpu::isa_name(fastssl::cpu::current_isa()); },
      "the CPU code path in use");
  m.def("use_cpu_path", &use_cpu_path, py::arg("name"),
        "chooses a CPU code path; False where it cannot run here");
  m.def("cpu_features", &cpu_features, "the processor features that decide, and whether they are here");
}
