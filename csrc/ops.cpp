// The operators' registrations. Fakes and formulas: rose_ops/_ops.py, reference.py.
#include <torch/csrc/stable/library.h>

#include "cpu/ops_cpu.h"
#ifdef ROSE_WITH_CUDA
#include "cuda/ops_cuda.h"
#endif
#include "schemas.h"

STABLE_TORCH_LIBRARY(rose_ops, m) {
  rose::define_operators(m);
  m.def("latest_bracket_report() -> Tensor");  // of the CPU only, for tests
}

STABLE_TORCH_LIBRARY_IMPL(rose_ops, CompositeExplicitAutograd, m) {
  m.impl("latest_bracket_report", TORCH_BOX(&rose::cpu::latest_bracket_report));
}

STABLE_TORCH_LIBRARY_IMPL(rose_ops, CPU, m) {
  m.impl("select", TORCH_BOX(&rose::cpu::select));
  m.impl("capture_", TORCH_BOX(&rose::cpu::capture_));
  m.impl("adamw_", TORCH_BOX(&rose::cpu::adamw_));
  m.impl("bracket_adamw_", TORCH_BOX(&rose::cpu::bracket_adamw_));
  m.impl("bracket_capture_", TORCH_BOX(&rose::cpu::bracket_capture_));
  m.impl("sums_of_squares", TORCH_BOX(&rose::cpu::sums_of_squares));
  m.impl("clip_factors", TORCH_BOX(&rose::cpu::clip_factors));
  m.impl("select_tensors_", TORCH_BOX(&rose::cpu::select_tensors_));
}

#ifdef ROSE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rose_ops, CUDA, m) {
  m.impl("select", TORCH_BOX(&rose::cuda::ops::select));
  m.impl("capture_", TORCH_BOX(&rose::cuda::ops::capture_));
  m.impl("adamw_", TORCH_BOX(&rose::cuda::ops::adamw_));
  m.impl("bracket_adamw_", TORCH_BOX(&rose::cuda::ops::bracket_adamw_));
  m.impl("bracket_capture_", TORCH_BOX(&rose::cuda::ops::bracket_capture_));
  m.impl("sums_of_squares", TORCH_BOX(&rose::cuda::ops::sums_of_squares));
  m.impl("clip_factors", TORCH_BOX(&rose::cuda::ops::clip_factors));
  m.impl("select_tensors_", TORCH_BOX(&rose::cuda::ops::select_tensors_));
}
#endif
