// The operators, each once: its schema, its type in C++, and its registration for a backend. What they
// compute: rose_ops/reference.py; their fakes: rose_ops/_ops.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace rose {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

constexpr const char* kSchemas[] = {
    "rank_(Tensor(a!)[] masks, Tensor[] grads, Tensor[] exp_avgs, Tensor hyper, Tensor group, "
    "Tensor? inv_scale, Tensor? clip, Tensor? record, int[] ranking) -> Tensor",
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor[] first_masks, Tensor[] second_masks, Tensor? record, Tensor lr, "
    "Tensor hyper, Tensor group, Tensor offsets, Tensor? inv_scale, Tensor? clip, Tensor? found_inf, "
    "float gamma, int[] ranking, int[] rounding) -> Tensor",
    "count_keys(Tensor[] grads, Tensor[] exp_avgs, Tensor hyper, Tensor group, Tensor? inv_scale, "
    "Tensor? clip, bool rank_inactive, Tensor? digits) -> Tensor",
    "sums_of_squares(Tensor[] tensors, Tensor? inv_scale) -> Tensor",
    "clip_factors(Tensor sums, float max_norm) -> Tensor",
    "select_tensors_(Tensor(a!) mask, Tensor sums, Tensor? exp_avg_sums, Tensor hyper, Tensor group, "
    "Tensor? clip, int upper, int lower, bool rank_inactive) -> Tensor",
    // For tests: what half-widths of brackets are multiplied by from now on; returns what it was.
    "_set_bracket_width(float width) -> float",
};

using RankSignature = Tensor(Tensors masks, Tensors grads, Tensors exp_avgs, Tensor hyper, Tensor group,
                             MaybeTensor inv_scale, MaybeTensor clip, MaybeTensor record,
                             Integers ranking);
using StepSignature = Tensor(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                             Tensors steps, Tensors first_masks, Tensors second_masks,
                             MaybeTensor record, Tensor lr, Tensor hyper, Tensor group, Tensor offsets,
                             MaybeTensor inv_scale, MaybeTensor clip, MaybeTensor found_inf,
                             double gamma, Integers ranking, Integers rounding);
using CountKeysSignature = Tensor(Tensors grads, Tensors exp_avgs, Tensor hyper, Tensor group,
                                  MaybeTensor inv_scale, MaybeTensor clip, bool rank_inactive,
                                  MaybeTensor digits);
using SumsOfSquaresSignature = Tensor(Tensors tensors, MaybeTensor inv_scale);
using ClipFactorsSignature = Tensor(Tensor sums, double max_norm);
using SelectTensorsSignature = Tensor(Tensor mask, Tensor sums, MaybeTensor exp_avg_sums, Tensor hyper,
                                      Tensor group, MaybeTensor clip, int64_t upper, int64_t lower,
                                      bool rank_inactive);

template <typename Library>
void define_operators(Library& m) {
  for (const char* schema : kSchemas) m.def(schema);
}

// Backend: a struct of static functions of these names and types. (count_keys is the CPU's alone: other
// devices have it from rose_ops/_ops.py.)
template <typename Backend, typename Library>
void implement_operators(Library& m) {
  m.impl("rank_", TORCH_BOX(&Backend::rank_));
  m.impl("step_", TORCH_BOX(&Backend::step_));
  m.impl("sums_of_squares", TORCH_BOX(&Backend::sums_of_squares));
  m.impl("clip_factors", TORCH_BOX(&Backend::clip_factors));
  m.impl("select_tensors_", TORCH_BOX(&Backend::select_tensors_));
}

// For operators without tensors.
template <typename Library>
void implement_hooks(Library& m) {
  m.impl("_set_bracket_width", TORCH_BOX(&set_bracket_width));
}

}  // namespace rose
