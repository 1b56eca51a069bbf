// The operator schemas and their registrations. Fakes and formulas: rose_ops/_ops.py, reference.py.
#include <torch/csrc/stable/library.h>

#include "cpu/ops_cpu.h"

STABLE_TORCH_LIBRARY(rose_ops, m) {
  m.def(
      "select(Tensor[] grads, Tensor[] exp_avgs, Tensor hyper, Tensor group, Tensor? inv_scale, "
      "int upper, int lower, bool rank_inactive, bool approx) -> Tensor");
  m.def(
      "capture_(Tensor(a!)[] masks, Tensor[] grads, Tensor[] exp_avgs, Tensor hyper, Tensor group, "
      "Tensor? inv_scale, Tensor selection, bool rank_inactive) -> ()");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor[] first_masks, Tensor[] second_masks, Tensor? selection, Tensor lr, "
      "Tensor hyper, Tensor group, Tensor offsets, Tensor? inv_scale, Tensor? found_inf, float gamma, "
      "bool rank_inactive, int seed) -> Tensor");
  m.def("tensor_norms(Tensor[] tensors, Tensor? inv_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rose_ops, CPU, m) {
  m.impl("select", TORCH_BOX(&rose::cpu::select));
  m.impl("capture_", TORCH_BOX(&rose::cpu::capture_));
  m.impl("adamw_", TORCH_BOX(&rose::cpu::adamw_));
  m.impl("tensor_norms", TORCH_BOX(&rose::cpu::tensor_norms));
}
