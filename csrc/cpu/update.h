// The masked update.
#pragma once

#include "../update_plan.h"
#include "pass.h"

namespace rose {
namespace cpu {

// What gradients are multiplied by.
struct Factors {
  float inv_scale, clip, plain_clip;  // plain: of tensors that are not selective

  Factors(const std::optional<Tensor>& inv_scale, const std::optional<Tensor>& clip);
};

class Updater final : public Body {
 public:
  // Changes nothing. `wanted`: if it ranks, the second-order mask is found on the way.
  Updater(const UpdatePlan& plan, const Factors& factors, double gamma, const Ranking& wanted,
          const Rounding& rounding);

  // Counts the step; before the first run.
  void begin() override;
  void run(size_t index, int64_t start, int n, uint32_t place, const Stage& stage, Notes& notes,
           UpdateCounts& counts) override;
  int redo(size_t index, int64_t element, const float* old, bool selected) override;
  void prefetch(size_t index, int64_t element) const override;
  Logs logs() const override { return Logs::kOld; }

 private:
  // Of one tensor. A mask that is alone is the second one, whatever its order.
  struct Masks {
    MaskOfRun first, second;
  };

  Step step_of(size_t index, int64_t start) const;

  const UpdatePlan& plan_;
  const Factors factors_;
  const double gamma_;
  const bool from_risk_, rank_inactive_;
  const Rounding rounding_;
  std::vector<Masks> masks_;
  std::vector<Update> updates_;
  std::vector<uint32_t> random_keys_;
};

}  // namespace cpu
}  // namespace rose
