// The arithmetic of one element: risk keys, selection, masked AdamW, narrowing. Written once, for the
// host (C++17) and the device (CUDA). Every product, sum, quotient and root below is one IEEE
// round-to-nearest operation: build with -ffp-contract=off (host); the device uses the _rn intrinsics.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define ROSE_INLINE static __host__ __device__ __forceinline__
#else
#define ROSE_INLINE static inline __attribute__((always_inline))
#endif
#define ROSE_ALWAYS_INLINE __attribute__((always_inline))  // for lambdas

namespace rose {
// Functions are static: this header is compiled once per instruction set, and a linker that merged the
// copies could hand AVX-512 code to a CPU without it.

// ---------------------------------------------------------------------------------------------- bits

ROSE_INLINE uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
#endif
}

ROSE_INLINE float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
#endif
}

constexpr uint32_t kInfinityBits = 0x7F800000u;

// Class tests look at bits, so that no floating-point mode can change their answer.
ROSE_INLINE uint32_t abs_bits(float x) { return float_bits(x) & 0x7FFFFFFFu; }

// ---------------------------------------------------------------------------------------- operations

#if defined(__CUDA_ARCH__)
ROSE_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
ROSE_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
ROSE_INLINE float sub(float a, float b) { return __fsub_rn(a, b); }
ROSE_INLINE float div(float a, float b) { return __fdiv_rn(a, b); }
ROSE_INLINE float root(float a) { return __fsqrt_rn(a); }
#else
// For vectors of lanes, too, which have these operators; a number in their company is one for all
// lanes.
template <typename A, typename B>
ROSE_INLINE auto mul(A a, B b) {
  return a * b;
}
template <typename A, typename B>
ROSE_INLINE auto add(A a, B b) {
  return a + b;
}
template <typename A, typename B>
ROSE_INLINE auto sub(A a, B b) {
  return a - b;
}
template <typename A, typename B>
ROSE_INLINE auto div(A a, B b) {
  return a / b;
}
ROSE_INLINE float root(float a) { return __builtin_sqrtf(a); }
#endif
template <typename T>
ROSE_INLINE T choose(bool condition, T a, T b) {
  return condition ? a : b;
}

// --------------------------------------------------------------------------------------------- risks

// A risk is a non-negative float, whose bit pattern orders as its value does: that is its key.
// Elements outside the ranking have keys above 2^31, which a signed comparison puts below all others.
constexpr uint32_t kInactiveKey = 0x80000000u;
constexpr uint32_t kNonfiniteKey = 0x80100000u;

// Eq. 2: r = |g|.
ROSE_INLINE uint32_t first_order_key(float g, bool rank_inactive) {
  const uint32_t a = abs_bits(g);
  const uint32_t key = (a == 0 && !rank_inactive) ? kInactiveKey : a;
  return a < kInfinityBits ? key : kNonfiniteKey;
}

// Eq. 4: r = |alpha |g| / |m| - 1|; with rank_inactive, where m == 0: inf, or 1 if g == 0 too.
ROSE_INLINE uint32_t second_order_key(float g, float m, float alpha, bool rank_inactive) {
  const uint32_t ag = abs_bits(g), am = abs_bits(m);
#if defined(__CUDA_ARCH__)
  const uint32_t divisor =
      am == 0 ? 0x3F800000u : am;  // division by zero takes a device ten times as long
#else
  const uint32_t divisor = am;
#endif
  const float ratio = div(mul(alpha, bits_float(ag)), bits_float(divisor));
  const uint32_t ranked = abs_bits(sub(ratio, 1.0f));
  const uint32_t literal = ag == 0 ? 0x3F800000u : kInfinityBits;
  const uint32_t inactive = rank_inactive ? literal : kInactiveKey;
  const uint32_t key = am == 0 ? inactive : ranked;
  const uint32_t larger = ag > am ? ag : am;
  return larger < kInfinityBits ? key : kNonfiniteKey;
}

// floor(fraction * n) for a fraction in units of 1e-9 (Eq. 3), without overflow for any int64 n >= 0.
ROSE_INLINE int64_t rank_of(int64_t fraction, int64_t n) {
  constexpr int64_t unit = 1000000000;
  return fraction * (n / unit) + fraction * (n % unit) / unit;
}

// tau_l < r <= tau_h, or inactive. -1 for `high`: nothing ranked; -1 for `low`: no lower bound.
struct Bounds {
  int32_t high, low;
};

// `value` if selected, else 0. Nested conditions rather than && and ||: compilers vectorize these.
ROSE_INLINE int32_t if_selected(uint32_t key, Bounds bounds, int32_t value) {
  const int32_t k = (int32_t)key;
  const int32_t below = k <= bounds.high ? value : 0;
  const int32_t inside = k > bounds.low ? below : 0;
  return key == kInactiveKey ? value : inside;
}

// A record, with names: the fields of rose_ops/definitions.py in the same order. An empty one: nothing
// is ranked.
struct Selection {
  int64_t high = -1, low = -1, kept = 0, ranked = 0, inactive = 0, nonfinite = 0, misses = 0;
  int64_t unused = 0;

  Bounds bounds() const { return {static_cast<int32_t>(high), static_cast<int32_t>(low)}; }
};
constexpr int kFields = 8;
static_assert(sizeof(Selection) == kFields * sizeof(int64_t), "a record is an int64 tensor");

// ------------------------------------------------------------------------------------- masked AdamW

// What a captured mask says of one tensor, and how.
enum class MaskKind : uint8_t {
  kNone,   // there is no mask: nothing is selected by it
  kBits,   // one bit for each element, the first in the lowest bit of the first byte
  kWhole,  // one bool for all elements
  kAll,    // an empty mask, of a tensor that was not there at the capture: all are selected
};

// M of an element (Eq. 5) is one of four numbers, by the weight of the masks that select it: 0, gamma,
// 1 - gamma, 1. The masks of an ensemble weigh 1 and 2 (first and second order), a mask that is
// alone 3.
struct MaskWeights {
  int32_t first, second;
};
constexpr MaskWeights kWeightsOfEnsemble = {1, 2}, kWeightsOfOne = {3, 3};

// A row of the hyperparameter table, as in rose_ops/definitions.py.
struct Hyper {
  double beta1, beta2, eps, weight_decay, sign, selective;
};

// The constants of one update: one tensor (its group's hyperparameters, its step).
struct Update {
  float beta1, c1;  // c1 = float32(1.0 - beta1), not 1f - beta1
  float beta2, c2;
  float eps;
  float inv_root_bias2;  // 1 / sqrt(1 - beta2^t)
  // By weight: M, lr*M / (1 - beta1^t), 1 - lr*M*weight_decay
  float m[4], step_size[4], decay[4];
};

// The number after `step`: one more, or, where that rounds to the same number (from 2^24 on), the next
// float32, so that the rounding of no two steps is keyed alike.
ROSE_INLINE float next_step(float step) {
  const float next = add(step, 1.0f);
  if (next != step || abs_bits(step) >= kInfinityBits) return next;
  return bits_float(step > 0.0f ? float_bits(step) + 1 : float_bits(step) - 1);
}

// What keys random bits of a step: its number below 2^24, else its bit pattern, which is larger.
ROSE_INLINE uint32_t step_word(float step) {
  if (step >= 0.0f && step < 16777216.0f) return (uint32_t)step;
  return abs_bits(step) > kInfinityBits ? 0x7FC00000u : float_bits(step);
}

// `step` counts from 1.
ROSE_INLINE Update make_update(const Hyper& h, double lr, double step, double gamma) {
  Update u;
  u.beta1 = (float)h.beta1;
  u.c1 = (float)(1.0 - h.beta1);
  u.beta2 = (float)h.beta2;
  u.c2 = (float)(1.0 - h.beta2);
  u.eps = (float)h.eps;
  u.inv_root_bias2 = (float)(1.0 / sqrt(1.0 - pow(h.beta2, step)));
  const double values[4] = {0.0, gamma, 1.0 - gamma, 1.0};
  const double bias1 = 1.0 - pow(h.beta1, step);
  for (int i = 0; i < 4; ++i) {
    u.m[i] = (float)values[i];
    u.step_size[i] = (float)(lr * values[i] / bias1);
    u.decay[i] = (float)(1.0 - lr * values[i] * h.weight_decay);
  }
  return u;
}

template <typename X>
ROSE_INLINE X second_moment(X v, X g, const Update& u) {
  return add(mul(u.beta2, v), mul(u.c2, mul(g, g)));
}

// One step in place where `on`, in two parts, with what M makes of the gradient, the step size and the
// decay. X is a float, or a vector of lanes.
template <typename X, typename Condition>
ROSE_INLINE void moments_step(X& m, X& v, X g, Condition on, const Update& u) {
  const X gp = choose(on, g, m);
  m = choose(on, add(mul(u.beta1, m), mul(u.c1, gp)), m);
  v = second_moment(v, gp, u);
}

template <typename X, typename Condition>
ROSE_INLINE void parameter_step(X& p, X m, X v, Condition on, X step_size, X decay, const Update& u) {
  const X denom = add(mul(root(v), u.inv_root_bias2), u.eps);
  p = choose(on, sub(mul(p, decay), mul(step_size, div(m, denom))), p);
}

// p, m, v of one element in place, whose masks have this `weight`; unless `kFractional`, 0 or 3.
template <bool kFractional>
ROSE_INLINE void adamw_element(float& p, float& m, float& v, float g, int weight, const Update& u) {
  float step_size = u.step_size[3], decay = u.decay[3];
  if (kFractional && (uint32_t)(weight - 1) < 2u) {  // no indices: constants may be in registers
    const bool is_first = weight == 1;
    g = add(mul(is_first ? u.m[1] : u.m[2], g), mul(is_first ? u.m[2] : u.m[1], m));
    step_size = is_first ? u.step_size[1] : u.step_size[2];
    decay = is_first ? u.decay[1] : u.decay[2];
  }
  moments_step(m, v, g, weight != 0, u);
  parameter_step(p, m, v, weight != 0, step_size, decay, u);
}

// ----------------------------------------------------------------------------------------- narrowing

enum class Dtype : uint8_t { kFloat32, kBFloat16, kFloat16 };

ROSE_INLINE float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

// Round to nearest, ties to even, on integers: hardware conversions may flush denormals.
ROSE_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)((u & 0x7FFFFFFFu) > kInfinityBits ? 0x7FC0u : rounded);
}

// Stochastic rounding: up with the probability that makes the result right on average. Inf stays, since
// the bits that are cut off are 0; a NaN stays a NaN.
ROSE_INLINE uint16_t float_to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = float_bits(x), rounded = u + (random & 0xFFFFu);
  return (uint16_t)((abs_bits(x) > kInfinityBits ? u | 0x00400000u : rounded) >> 16);
}

ROSE_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7FFFu, sign = (uint32_t)(h & 0x8000u) << 16;
  // Exponent rebias by an exact multiplication, which also normalises the denormals of binary16.
  const uint32_t finite = float_bits(mul(bits_float(magnitude << 13), 0x1p112f));
  const uint32_t special = kInfinityBits | (magnitude << 13);
  return bits_float(sign | (magnitude < 0x7C00u ? finite : special));
}

ROSE_INLINE uint16_t float_to_half(float x) {
  const uint32_t u = abs_bits(x), sign = (float_bits(x) >> 16) & 0x8000u;
  const uint32_t normal = (u - ((127u - 15u) << 23) + 0xFFFu + ((u >> 13) & 1u)) >> 13;
  // Below 2^-14 an addition aligns the significand: its own rounding is the rounding wanted.
  const uint32_t denormal = float_bits(add(bits_float(u), 0.5f)) - 0x3F000000u;
  const uint32_t special = u > kInfinityBits ? 0x7E00u : 0x7C00u;
  const uint32_t finite = u < 0x38800000u ? denormal : normal;
  return (uint16_t)(sign | (u < 0x477FF000u ? finite : special));
}

// 32-bit mixer "lowbias32" (C. Wellons, hash-prospector).
ROSE_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0xD35A2D97u;
  return x ^ (x >> 15);
}

// 32 random bits keyed on (seed, word of the step, index): no state, any order, any device.
ROSE_INLINE uint32_t random_key(uint32_t seed, uint32_t step) {
  return mix(seed ^ (step * 0x9E3779B9u));
}
ROSE_INLINE uint32_t random_bits(uint32_t key, uint32_t index_high, uint32_t index_low) {
  return mix(index_low ^ mix(index_high ^ key));
}

// What is rounded stochastically. Two neighbours, whose global indices differ in the lowest bit, have a
// word of random bits each: the first is for both's second moments, the other for both's parameters;
// its lower half is for the first neighbour.
enum class Rounded : uint8_t { kSecondMoment, kParameter };

ROSE_INLINE uint32_t rounding_word(uint32_t index_low, Rounded what) {
  return (index_low & ~1u) | (uint32_t)what;
}
// In the lower half: 16 random bits for an element.
ROSE_INLINE uint32_t rounding_bits(uint32_t key, uint64_t index, Rounded what) {
  const uint32_t low = (uint32_t)index;
  const uint32_t word = random_bits(key, (uint32_t)(index >> 32), rounding_word(low, what));
  return word >> (16 * (low & 1u));
}

}  // namespace rose
