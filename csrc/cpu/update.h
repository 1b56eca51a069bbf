// The masked update of tiles: what the operators that update have in common.
#pragma once

#include <optional>
#include <vector>

#include "../arguments.h"
#include "bracket.h"

namespace rose {
namespace cpu {

// What gradients are multiplied by.
struct Factors {
  float inv_scale, clip, plain_clip;  // plain: of tensors that are not selective

  Factors(const std::optional<Tensor>& inv_scale, const std::optional<Tensor>& clip);
};

struct UpdateTensors {
  std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &steps, &first_masks, &second_masks;
};

struct UpdateSettings {
  double gamma;
  bool from_risk;  // the second-order mask is found on the way
  bool rank_inactive;
  uint32_t seed;
  bool stochastic;  // rounding of bfloat16 parameters
};

class Updater final : public BracketBody {
 public:
  // Checks everything, changes nothing.
  Updater(const UpdateTensors& tensors, const Tensor& lr, const Tensor& hyper, const Tensor& group,
          const Tensor& offsets, const Factors& factors, const UpdateSettings& settings);

  const Segments& segments() const { return segments_; }
  const Groups& groups() const { return groups_; }

  // Counts the step; before the first tile.
  void begin();
  void tile(size_t index, int64_t start, int n, Bounds bounds, BracketLog* log, UpdateCounts& counts);

  void tile(size_t index, int64_t start, int n, Bounds bounds, BracketLog& log,
            UpdateCounts& counts) override {
    tile(index, start, n, bounds, &log, counts);
  }
  int redo(size_t index, int64_t element, const float* old, bool selected) override;
  void prefetch(size_t index, int64_t element) const override;
  bool updates() const override { return true; }

 private:
  float gradient_factor(size_t i) const {
    return static_cast<float>(groups_[i].sign) * factors_.inv_scale;
  }
  float clip_factor(size_t i) const {
    return groups_[i].selective != 0 ? factors_.clip : factors_.plain_clip;
  }
  // Values of operand k, unless they are there already.
  void store_operand(size_t index, size_t k, int64_t start, int n, const float* values) const;

  const Segments segments_;
  const Groups groups_;
  const double* lr_;
  const int64_t* offsets_;
  std::vector<float*> steps_;
  Factors factors_;
  UpdateSettings settings_;
  std::vector<Masks> masks_;
  std::vector<Update> updates_;
  std::vector<uint32_t> random_keys_;
};

}  // namespace cpu
}  // namespace rose
