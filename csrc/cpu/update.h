// The masked update: what the operators that update have in common.
#pragma once

#include <optional>
#include <vector>

#include "../arguments.h"
#include "pass.h"

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

class Updater final : public Body {
 public:
  // Checks everything, changes nothing.
  Updater(const UpdateTensors& tensors, const Tensor& lr, const Tensor& hyper, const Tensor& group,
          const Tensor& offsets, const Factors& factors, const UpdateSettings& settings);

  const Segments& segments() const { return segments_; }
  const Groups& groups() const { return groups_; }

  // Counts the step; before the first run.
  void begin();
  void run(size_t index, int64_t start, int n, uint32_t place, const Stage& stage, Notes& notes,
           UpdateCounts& counts) override;
  int redo(size_t index, int64_t element, const float* old, bool selected) override;
  void prefetch(size_t index, int64_t element) const override;
  Logs logs() const override { return Logs::kOld; }

 private:
  // Masks of one tensor, of which `first` and `second` are bits or answers for all of it.
  struct Masks {
    MaskOfRun first, second;
  };

  Step step_of(size_t index, int64_t start) const;

  const Segments segments_;
  const Groups groups_;
  const double* lr_;
  const int64_t* offsets_;
  std::vector<float*> steps_;
  Factors factors_;
  UpdateSettings settings_;
  bool fractional_;
  std::vector<Masks> masks_;
  std::vector<Update> updates_;
  std::vector<uint32_t> random_keys_;
};

}  // namespace cpu
}  // namespace rose
