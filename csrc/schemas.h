// The operator schemas.
#pragma once

namespace rose {

template <typename Library>
void define_operators(Library& m) {
  m.def(
      "select(Tensor[] grads, Tensor[] exp_avgs, Tensor hyper, Tensor group, Tensor? inv_scale, "
      "Tensor? clip, int upper, int lower, bool rank_inactive, bool approx, int draw=0) -> Tensor");
  m.def(
      "capture_(Tensor(a!)[] masks, Tensor[] grads, Tensor[] exp_avgs, Tensor hyper, Tensor group, "
      "Tensor? inv_scale, Tensor? clip, Tensor selection, bool rank_inactive) -> ()");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor[] first_masks, Tensor[] second_masks, Tensor? selection, Tensor lr, "
      "Tensor hyper, Tensor group, Tensor offsets, Tensor? inv_scale, Tensor? clip, "
      "Tensor? found_inf, float gamma, bool rank_inactive, int seed, bool stochastic) -> Tensor");
  m.def(
      "bracket_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor[] first_masks, Tensor lr, Tensor hyper, "
      "Tensor group, Tensor offsets, Tensor? inv_scale, Tensor? clip, Tensor? found_inf, float gamma, "
      "int upper, int lower, bool rank_inactive, int seed, bool stochastic, int draw, float width, "
      "bool approx=False) -> Tensor");
  m.def(
      "bracket_capture_(Tensor(a!)[] masks, Tensor[] grads, Tensor[] exp_avgs, Tensor hyper, "
      "Tensor group, Tensor? inv_scale, Tensor? clip, int upper, int lower, bool rank_inactive, "
      "int draw, float width, bool approx=False) -> Tensor");
  m.def("sums_of_squares(Tensor[] tensors, Tensor? inv_scale) -> Tensor");
  m.def("clip_factors(Tensor sums, float max_norm) -> Tensor");
  m.def(
      "select_tensors_(Tensor(a!) mask, Tensor sums, Tensor? exp_avg_sums, Tensor hyper, Tensor group, "
      "Tensor? clip, int upper, int lower, bool rank_inactive) -> Tensor");
}

}  // namespace rose
