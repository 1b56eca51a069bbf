// The arithmetic of norms: clipping, and thresholds between whole tensors. For the host and the device,
// where products and sums are one by one, too (-fmad=false). Formulas: rose_ops/portable.py.
#pragma once

#include "element.h"

namespace rose {

// Of a sum of squares, rounded once.
ROSE_INLINE float norm_of(double sum) { return (float)sqrt(sum); }

// The norm of all gradients, and what those of selective and of other tensors are multiplied by.
ROSE_INLINE void write_clip_factors(double sum, float max_norm, float* out) {
  const float norm = norm_of(sum);
  const float factor = mul(div(1.0f, add(norm, 1e-6f)), max_norm);
  out[0] = norm;
  out[2] = factor > 1.0f ? 1.0f : factor;
  out[1] = abs_bits(norm) < kInfinityBits ? out[2] : bits_float(0x7FC00000u);
}

// A linearly interpolated quantile of n > 0 numbers in order: that at `index`, moved by `weight`
// towards that at `next`.
struct Quantile {
  int64_t index, next;
  double weight;
};

ROSE_INLINE Quantile quantile_of(int64_t fraction, int64_t n) {
  constexpr int64_t unit = 1000000000;
  const int64_t last = n - 1, product = fraction * (last % unit);
  const int64_t index = fraction * (last / unit) + product / unit;
  return {index, index < last ? index + 1 : last, (double)(product % unit) / (double)unit};
}

ROSE_INLINE uint32_t between(uint32_t low, uint32_t high, double weight) {
  if (weight == 0.0 || low == high) return low;
  if (high == kInfinityBits) return high;  // that may be inf - inf
  const double from = (double)bits_float(low), to = (double)bits_float(high);
  return float_bits((float)(from + weight * (to - from)));
}

}  // namespace rose
