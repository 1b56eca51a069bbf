// Risks of elements: their keys, and what can be said of them without one.
#pragma once

#include "access.cuh"

namespace rose {
namespace cuda {

constexpr uint32_t kNoKey = 0xFFFFFFFFu;  // of a lane without an element

// What gradients are multiplied by, one after the other.
struct Factors {
  float inv_scale, clip;

  ROSE_METHOD float scaled(float g) const { return mul(mul(g, inv_scale), clip); }
};

ROSE_DEVICE Factors factors_of(const Risk& risk) {
  return {scalar_or_one(risk.inv_scale), scalar_or_one(risk.clip)};
}

// Of a scaled gradient.
ROSE_DEVICE uint32_t key_of(const Risk& risk, float alpha, float g, float m) {
  return risk.second_order ? second_order_key(g, m, alpha, risk.rank_inactive)
                           : first_order_key(g, risk.rank_inactive);
}

ROSE_DEVICE uint32_t key_at(const Risk& risk, Factors factors, const Segment& segment, int64_t i) {
  int64_t places[2];
  locate(risk.table.dims, segment, i, places, risk.operand);
  const char* const* data = segment.data + risk.operand;
  const Dtype* dtype = segment.dtype + risk.operand;
  const float g = read_element(data[0], dtype[0], places[0]);
  float m = 0.0f;
  if (risk.second_order) m = read_element(data[1], dtype[1], places[1]);
  return key_of(risk, segment.alpha, factors.scaled(g), m);
}

// body(key) for every ranked element of this block's share. For the rare pass that needs all keys.
template <typename Body>
ROSE_DEVICE void for_each_key(const Risk& risk, Body body) {
  const Factors factors = factors_of(risk);
  for_each_run(risk.table, [&](const Run& run) ROSE_ALWAYS_INLINE {
    const Segment& segment = risk.table.segments[run.segment];
    if (!segment.selective) return;
    const Dtype* dtype = segment.dtype + risk.operand;
    const char* const g_data = data_from(segment, risk.operand, dtype[0], run.begin);
    const char* const m_data = data_from(segment, risk.operand + 1, dtype[1], run.begin);
    const int middle = segment.access == Access::kSingle ? 0 : run.count / 4 * 4;
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < middle; i += kThreads * 4) {
      const auto raw_g = read_vector<4>(g_data, dtype[0], i);
      const auto raw_m = risk.second_order ? read_vector<4>(m_data, dtype[1], i) : Raw<4>();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float g = factors.scaled(get(raw_g, dtype[0], j));
        body(key_of(risk, segment.alpha, g, get(raw_m, dtype[1], j)));
      }
    }
#pragma unroll 1
    for (int i = middle + threadIdx.x; i < run.count; i += kThreads) {
      body(key_at(risk, factors, segment, run.begin + i));
    }
  });
}

// ---------------------------------------------------------------------------------------- without keys

// Most elements are far from a threshold, and a comparison shows on which side, without the division
// that a key takes. A risk of second order is |x - |m|| / |m| with x = alpha * |g|: it is below a key
// of the value L where |x - |m|| < below * |m|, and above one of the value H where it is > above * |m|.
// `below` and `above` are L and H moved apart by more than all rounding errors together. Let u = 2^-24.
// The key's quotient and difference are off by u(1 + 2r) in all; the difference and the products here
// by factors 1 +- u. So 4u(1 + 2L) and 4u(1 + 2H), themselves rounded, suffice where |m| is large
// enough for products that are no denormals (kSmallestMoment, and `below` at least 2^-20). In first
// order, risks are compared with L and H themselves.
struct Fence {
  float below, above;  // -1: no risk is below, every risk is above
};

constexpr float kSmallestMoment = 0x1p-100f;

template <bool kSecondOrder>
ROSE_DEVICE Fence fence_of(uint32_t low, uint32_t high) {
  if (low > kInfinityBits) return {-1.0f, -1.0f};
  Fence fence = {bits_float(low), bits_float(high < kInfinityBits ? high : kInfinityBits)};
  if (!kSecondOrder) return fence;
  fence.below = sub(mul(fence.below, 1.0f - 0x1p-21f), 0x1p-22f);
  fence.above = add(mul(fence.above, 1.0f + 0x1p-21f), 0x1p-22f);
  if (fence.below < 0x1p-20f) fence.below = -1.0f;
  return fence;
}

// What comparisons say of a thread's elements, in a bit for each.
struct Verdict {
  unsigned selected = 0;
  unsigned unsure = 0;
  unsigned below_lower = 0;  // the rest is above both
  unsigned inactive = 0;     // and selected
};

// The intervals that hold the thresholds, as fences.
template <bool kSecondOrder>
struct Judge {
  Fence upper, lower;
  float alpha;
  bool ranks_inactive;

  // Of the scaled gradient g of element j. NaN and inf fail all comparisons that would make them sure.
  // kUsual: there is no lower threshold. No branches: lanes would part ways.
  template <bool kUsual>
  ROSE_METHOD void judge(float g, float m, int j, Verdict& verdict) const {
    float risk = fabsf(g), unit = 1.0f;
    bool is_settled = risk > 0.0f;
    if (kSecondOrder) {
      unit = fabsf(m);
      risk = fabsf(sub(mul(alpha, risk), unit));
      is_settled = unit >= kSmallestMoment;
    }
    const bool is_below = (risk < mul(upper.below, unit)) & is_settled;
    const bool is_above =
        (risk > mul(upper.above, unit)) & (risk < bits_float(kInfinityBits)) & is_settled;
    if (kUsual) {
      verdict.selected |= (unsigned)is_below << j;
      verdict.unsure |= (unsigned)!(is_below | is_above) << j;
      return;
    }
    const bool is_below_lower =
        risk<mul(lower.below, unit), is_above_lower = risk> mul(lower.above, unit);
    const bool is_sure = (is_below & (is_below_lower | is_above_lower)) | (is_above & is_above_lower);
    verdict.selected |= (unsigned)(is_below & is_above_lower) << j;
    verdict.below_lower |= (unsigned)(is_below & is_below_lower) << j;
    verdict.unsure |= (unsigned)!is_sure << j;
  }

  // Whole rows without a history are common (embeddings): of a thread's kCount elements, those that
  // have no risk, and are selected therefore, need no look at each. By whole warps.
  template <int kCount, typename Gradient, typename Moment>
  ROSE_METHOD void find_inactive(Gradient gradient, Moment moment, Verdict& verdict) const {
    if (ranks_inactive || __ballot_sync(kFullWarp, verdict.unsure == (1u << kCount) - 1) == 0) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const uint32_t zero = abs_bits(kSecondOrder ? moment(j) : gradient(j));
      verdict.inactive |= (unsigned)(zero == 0 && abs_bits(gradient(j)) < kInfinityBits) << j;
    }
    verdict.inactive &= verdict.unsure;
    verdict.unsure ^= verdict.inactive;
    verdict.selected |= verdict.inactive;
  }
};

}  // namespace cuda
}  // namespace rose
