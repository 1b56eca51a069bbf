// The k-th smallest of all risks, exactly, without storing them: keys are recomputed from the gradients
// and moments whenever they are needed.
#pragma once

#include <vector>

#include "segments.h"

namespace rose {
namespace cpu {

// Where keys come from: operand 0 of every segment is the gradient, operand 1 (second order) the first
// moment before the step.
struct RiskSource {
  const Segments& segments;
  bool second_order;
  bool rank_inactive;
  float inv_scale;
  std::vector<float> alpha;  // per segment

  // Of elements [start, start + n) of a segment, n <= kTile; `scratch` holds 3 * kTile floats, which
  // the result may point to.
  Risk risk(size_t index, int64_t start, int n, float* scratch) const;
};

// Same fields in the same order as rose_ops/reference.py.
struct Selection {
  int64_t high = -1, low = -1, kept = 0, ranked = 0, inactive = 0, nonfinite = 0, misses = 0;
  int64_t unused = 0;

  Bounds bounds() const { return {static_cast<int32_t>(high), static_cast<int32_t>(low)}; }
};
static_assert(sizeof(Selection) == 8 * sizeof(int64_t), "a selection is an int64 tensor of 8");

// Fractions in units of 1e-9. `approx`: thresholds rounded up to the edge of an 11-bit bin.
Selection select(const RiskSource& source, int64_t upper, int64_t lower, bool approx);

}  // namespace cpu
}  // namespace rose
