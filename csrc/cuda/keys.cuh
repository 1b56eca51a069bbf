// Risks of elements: as keys, which are exact and take a division; and by comparisons, which take none
// and settle most elements.
#pragma once

#include "access.cuh"

namespace rose {
namespace cuda {

// In the place of a key, where there is no ranked element. It is larger than every key.
constexpr uint32_t kNoKey = 0xFFFFFFFFu;

// What gradients are multiplied by, one after the other: the inverse of the loss scale, and what clips
// them to a norm.
struct Factors {
  float inv_scale, clip;

  ROSE_METHOD float scaled(float g) const { return mul(mul(g, inv_scale), clip); }
};

ROSE_DEVICE Factors factors_of(const Risk& risk) {
  return {scalar_or_one(risk.inv_scale), scalar_or_one(risk.clip)};
}

// The key of an element: `g` is its scaled gradient, `m` its first moment (not used in first order),
// and `alpha` 1 - beta1 of its group.
ROSE_DEVICE uint32_t key_of(const Risk& risk, float alpha, float g, float m) {
  return risk.second_order ? second_order_key(g, m, alpha, risk.rank_inactive)
                           : first_order_key(g, risk.rank_inactive);
}

// The key of element `i` of a segment, whose operands may have any strides.
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

// Calls body(key) for every element of the ranked segments in this block's share of the tiles, also for
// elements that are inactive or not finite. Only the rare pass that has to look at all keys does so.
template <typename Body>
ROSE_DEVICE void for_each_key(const Risk& risk, Body body) {
  const Factors factors = factors_of(risk);
  for_each_run(risk.table, [&](const Run& run) ROSE_ALWAYS_INLINE {
    const Segment& segment = risk.table.segments[run.segment];
    if (!segment.selective) return;
    const Dtype* dtype = segment.dtype + risk.operand;
    const char* const g_data = data_from(segment, risk.operand, dtype[0], run.begin);
    const char* const m_data = data_from(segment, risk.operand + 1, dtype[1], run.begin);
    // Four elements at a time before `middle`, and the others one by one.
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

// -------------------------------------------------------------------------------- by comparisons alone

// Most elements are far from a threshold, and a comparison shows on which side of it they are, without
// the division that a key takes. The threshold is known to lie among the keys from `low` to `high`,
// whose risks are the numbers L and H. A risk of second order is |x - |m|| / |m| with x = alpha * |g|.
// It is less than L where |x - |m|| < below * |m|, and more than H where |x - |m|| > above * |m|.
//
// `below` and `above` are L and H moved apart by more than all rounding errors together, so that a
// comparison never contradicts the key. Let u = 2^-24. The difference and the quotient of a key r are
// off by at most u(1 + 2r) in all; the difference and the products of the comparison by factors of 1 +-
// u. So distances of 4u(1 + 2L) and 4u(1 + 2H), which are rounded themselves, are enough, as long as no
// product is a denormal: |m| is at least kSmallestMoment, and `below` at least 2^-20. In first order a
// risk is |g|, nothing is rounded, and it is compared with L and H themselves.
struct Fence {
  float below, above;  // where they are -1: no risk is below; every risk is above
};

constexpr float kSmallestMoment = 0x1p-100f;

// The fence around the keys from `low` to `high`. A `low` that is no key means that there is no
// threshold, and that every element is above it.
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

// What comparisons say of a thread's elements: bit j is about its element j.
struct Verdict {
  unsigned selected = 0;     // by the masks' rule: above `lower` and not above `upper`; or inactive
  unsigned unsure = 0;       // no comparison settled it, so that its key is needed
  unsigned below_lower = 0;  // not selected. (Elements without any of these bits are above `upper`.)
  unsigned inactive = 0;     // there is nothing to rank it by, so that it is selected
};

// Settles elements by comparisons with the fences around the upper and the lower threshold.
template <bool kSecondOrder>
struct Judge {
  Fence upper, lower;
  float alpha;          // of the elements' segment
  bool ranks_inactive;  // elements that are inactive are ranked like others

  // Adds to `verdict` what is known of element j, by its scaled gradient g and its first moment m. If g
  // or m is NaN or infinite, the comparisons fail that would settle it, so it stays unsure. kUsual says
  // that there is no lower threshold. There are no branches, since the lanes of a warp would take them
  // one after the other.
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

  // Finds the inactive ones among the unsure ones of a thread's kCount elements, and settles them: they
  // are selected. gradient(j) and moment(j) are those of element j. This is worth it where whole rows
  // of a tensor have never had a gradient, as in embeddings; therefore it is tried only if some lane is
  // unsure of all of its elements. All lanes of a warp have to call it.
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
