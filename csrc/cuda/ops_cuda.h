// The operators on CUDA devices. Schemas are in ops.cpp, formulas in rose_ops/reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace rose {
namespace cuda {
namespace ops {

using torch::stable::Tensor;

Tensor select(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip, int64_t upper, int64_t lower,
              bool rank_inactive, bool approx, int64_t draw);

void capture_(std::vector<Tensor> masks, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              Tensor hyper, Tensor group, std::optional<Tensor> inv_scale, std::optional<Tensor> clip,
              Tensor selection, bool rank_inactive);

Tensor adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
              std::vector<Tensor> first_masks, std::vector<Tensor> second_masks,
              std::optional<Tensor> selection, Tensor lr, Tensor hyper, Tensor group, Tensor offsets,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip,
              std::optional<Tensor> found_inf, double gamma, bool rank_inactive, int64_t seed,
              bool stochastic);

Tensor bracket_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                      std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> steps, std::vector<Tensor> first_masks, Tensor lr,
                      Tensor hyper, Tensor group, Tensor offsets, std::optional<Tensor> inv_scale,
                      std::optional<Tensor> clip, std::optional<Tensor> found_inf, double gamma,
                      int64_t upper, int64_t lower, bool rank_inactive, int64_t seed, bool stochastic,
                      int64_t draw, double width, bool approx);

Tensor bracket_capture_(std::vector<Tensor> masks, std::vector<Tensor> grads,
                        std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
                        std::optional<Tensor> inv_scale, std::optional<Tensor> clip, int64_t upper,
                        int64_t lower, bool rank_inactive, int64_t draw, double width, bool approx);

Tensor sums_of_squares(std::vector<Tensor> tensors, std::optional<Tensor> inv_scale);

Tensor clip_factors(Tensor sums, double max_norm);

Tensor select_tensors_(Tensor mask, Tensor sums, std::optional<Tensor> exp_avg_sums, Tensor hyper,
                       Tensor group, std::optional<Tensor> clip, int64_t upper, int64_t lower,
                       bool rank_inactive);

}  // namespace ops
}  // namespace cuda
}  // namespace rose
