// The k-th smallest of all risks, exactly, without storing them: keys are recomputed from the gradients
// and moments whenever they are needed.
#pragma once

#include <vector>

#include "tiles.h"

namespace rose {
namespace cpu {

// Where keys come from: operand 0 of every segment is the gradient, operand 1 (second order) the first
// moment before the step.
struct RiskSource {
  const Segments& segments;
  bool second_order;
  bool rank_inactive;
  float inv_scale, clip;     // that gradients are multiplied by
  std::vector<float> alpha;  // per segment

  // Of elements [start, start + n) of a segment, n <= kTile; `scratch` holds 3 * kTile floats, which
  // the result may point to.
  Risk risk(size_t index, int64_t start, int n, float* scratch) const;

  // Of elements of a segment that were read already: g and (second order) m; `scratch` holds n floats.
  void keys(size_t index, int n, const float* g, const float* m, float* scratch, uint32_t* keys) const;
};

// Fractions in units of 1e-9. `approx`: thresholds are those of the sample `draw`.
Selection select(const RiskSource& source, int64_t upper, int64_t lower, bool approx, uint32_t draw);

}  // namespace cpu
}  // namespace rose
