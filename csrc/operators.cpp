#include "operators.h"

#include "cpu/ops_cpu.h"
#ifdef ROSE_WITH_CUDA
#include "cuda/ops_cuda.h"
#endif

STABLE_TORCH_LIBRARY(rose_ops, m) {
  rose::define_operators(m);
  m.def("latest_bracket_report() -> Tensor");  // of the CPU only, for tests
}

STABLE_TORCH_LIBRARY_IMPL(rose_ops, CompositeExplicitAutograd, m) {
  rose::implement_hooks(m);
  m.impl("latest_bracket_report", TORCH_BOX(&rose::cpu::latest_bracket_report));
}

STABLE_TORCH_LIBRARY_IMPL(rose_ops, CPU, m) {
  rose::implement_operators<rose::cpu::Operators>(m);
  m.impl("count_keys", TORCH_BOX(&rose::cpu::Operators::count_keys));
}

#ifdef ROSE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rose_ops, CUDA, m) { rose::implement_operators<rose::cuda::Operators>(m); }
#endif
