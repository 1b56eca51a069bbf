// What the loops are run on: the same on every machine. So no call has two arguments that draw random
// numbers (compilers differ in their order), and nothing depends on a library of mathematics.
#pragma once

#include <algorithm>
#include <vector>

#include "loops.h"

namespace rose {
namespace cpu {

inline uint64_t state;  // of the random numbers

inline uint32_t draw() {  // SplitMix64
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>(z >> 32);
}
inline uint32_t draw(uint32_t end) { return draw() % end; }
inline bool coin() { return draw() >> 31; }
template <typename T, size_t kSize>
T pick(const T (&from)[kSize]) {
  return from[draw(kSize)];
}
inline uint32_t pick_of(const std::vector<uint32_t>& from) {
  return from[draw(static_cast<uint32_t>(from.size()))];
}

enum class Kind { kTame, kRarelyWild, kWild, kZeros, kTies };

inline uint32_t float_of(Kind kind) {
  const uint32_t r = draw(), sign = r & kInactiveKey, mantissa = draw() & 0x7FFFFFu;
  const uint32_t usual = sign | (118 + (r >> 8) % 16) << 23 | mantissa;
  static const float ties[] = {0.0f, 0.25f, 0.5f, 0.75f, 1.0f, 1.5f, 2.0f, 3.0f};
  if (kind == Kind::kTame || (kind == Kind::kRarelyWild && (r & 0x3F0000u) != 0)) return usual;
  if (kind == Kind::kTies) return sign | float_bits(ties[r % 8]);
  if (kind == Kind::kZeros) return r % 8 == 0 ? usual : sign;
  const uint32_t any = (r >> 8) % 255 << 23 | mantissa, small = (24 + (r >> 8) % 8) << 23 | mantissa,
                 tie = float_bits(ties[(r >> 8) % 8]), largest = 254u << 23 | mantissa,
                 denormal = mantissa >> (r >> 8) % 23, nan = kInfinityBits | mantissa | 1;
  const uint32_t wild[] = {0, 0, mantissa, denormal, kInfinityBits, nan, tie, small, largest, any, any};
  return r % 16 < 11 ? sign | wild[r % 16] : usual;
}

// Elements, and some on both sides that nobody may touch.
struct Operand {
  static constexpr int kAround = 19;
  Dtype dtype;
  int item, n;
  std::vector<char> bytes;

  Operand(Dtype dtype, int n, Kind kind, bool positive = false)
      : dtype(dtype), item(dtype == Dtype::kFloat32 ? 4 : 2), n(n), bytes((n + 2 * kAround) * item) {
    for (int i = -kAround; i < n + kAround; ++i) {
      uint32_t x = float_of(kind);
      if (positive && draw(32) != 0) x &= 0x7FFFFFFFu;
      if (dtype == Dtype::kBFloat16) x >>= 16;
      if (dtype == Dtype::kFloat16) x = float_to_half(bits_float(x));
      if (dtype == Dtype::kFloat16 && kind == Kind::kWild && coin()) x = draw() & 0xFFFFu;
      __builtin_memcpy(data(i), &x, item);  // little-endian
    }
  }
  char* data(int i = 0) { return bytes.data() + (i + kAround) * item; }
  float value(int i) {
    uint32_t x = 0;
    __builtin_memcpy(&x, data(i), item);
    if (dtype == Dtype::kFloat32) return bits_float(x);
    const auto half = static_cast<uint16_t>(x);
    return dtype == Dtype::kBFloat16 ? bf16_to_float(half) : half_to_float(half);
  }
};

const Kind kKinds[] = {Kind::kTame, Kind::kRarelyWild, Kind::kWild, Kind::kZeros, Kind::kTies};

struct Data {
  std::vector<Operand> operands;
  Run run;

  Data(const std::vector<Dtype>& dtypes, int n) : run{} {
    const Kind kind = pick(kKinds);
    for (size_t k = 0; k < dtypes.size(); ++k) {
      // Of p and v anything, now and then; g and m are alike, for risks that are.
      const Kind own = dtypes.size() == 4 && (k == 0 || k == 3) && coin() ? pick(kKinds) : kind;
      operands.emplace_back(dtypes[k], n, own, k == 3);
    }
    for (size_t k = 0; k < dtypes.size(); ++k) {
      run.data[k] = operands[k].data();
      run.dtypes[k] = dtypes[k];
    }
    const float factors[][2] = {
        {1.0f, 1.0f}, {1.0f / 3, 0.7f}, {-1.0f / 3, 1.0f}, {0.7f, 0x1p100f}, {-0.0f, 1.0f}};
    const uint32_t which = draw(5);
    run.n = n;
    run.factors[0] = factors[which][0];
    run.factors[1] = factors[which][1];
    run.place = draw();
  }
  // In order: of gradients operands[k], and moments.
  std::vector<uint32_t> keys(size_t k, const Risk& risk) {
    std::vector<uint32_t> found;
    for (int i = 0; i < run.n; ++i) {
      const float g = operands[k].value(i) * run.factors[0] * run.factors[1];
      const uint32_t key = risk.second_order ? second_order_key(g, operands[k + 1].value(i), risk.alpha,
                                                                risk.rank_inactive)
                                             : first_order_key(g, risk.rank_inactive);
      if (key < kInactiveKey) found.push_back(key);
    }
    std::sort(found.begin(), found.end());
    if (found.empty()) found.push_back(draw(kInfinityBits));
    return found;
  }
};

inline Risk some_risk(bool second_order) {
  const bool rank_inactive = coin();
  return {second_order, rank_inactive, pick({1.0f, 0.3f, 25.0f})};
}

// A bracket among keys [begin, end), and what is treated as the threshold.
inline int32_t some_bracket(Bracket& bracket, const std::vector<uint32_t>& keys, size_t begin,
                            size_t end) {
  const auto n = static_cast<uint32_t>(end - begin);
  const uint32_t first = draw(n), width = draw(4), last = std::min(n - 1, first + width * n / 16);
  const auto key = [&](uint32_t i) { return static_cast<int32_t>(keys[begin + i]); };
  bracket = {key(first), key(last), -1};
  if (draw(8) == 0) bracket = {0, static_cast<int32_t>(kInfinityBits), -1};
  if (coin()) bracket.pivot = key((first + last) / 2);
  return pick({bracket.low, bracket.high, key((first + last) / 2), key(last)});
}

inline Stage some_stage(const std::vector<uint32_t>& keys) {
  Stage stage;
  const bool two = coin();
  const size_t middle = two ? keys.size() / 2 : 0;
  stage.bounds.high = some_bracket(stage.brackets[0], keys, middle, keys.size());
  if (two) {
    stage.count = 2;
    stage.bounds.low = some_bracket(stage.brackets[1], keys, 0, std::max<size_t>(middle, 1));
  }
  return stage;
}

struct SomeStep : Step {
  Update constants;
  std::vector<uint8_t> bits[2];

  explicit SomeStep(int n, bool is_ranked, bool is_fractional) : Step{} {
    const Hyper hypers[] = {
        {0.9, 0.999, 1e-8, 0.01, 1, 1}, {0, 0.99, 0, 0, 1, 1}, {0.5, 0.5, 1e-3, 1, 1, 1}};
    const Hyper hyper = pick(hypers);
    const double lr = pick({1e-3, 0.3}), gamma = pick({0.5, 0.3, 0.9});
    constants = make_update(hyper, lr, 1, gamma);
    constants.inv_root_bias2 *= pick({1.0f, 1.0f / 3});
    update = &constants;
    ranked = is_ranked;
    fractional = is_fractional;
    for (int k = 0; k < 2; ++k) {
      for (int i = 0; i < (n + 7) / 8; ++i) bits[k].push_back(static_cast<uint8_t>(draw()));
      const MaskOfRun masks[] = {{bits[k].data(), false}, {nullptr, true}, {nullptr, false}};
      (k == 0 ? first : second) = pick(masks);
    }
    stochastic = coin();
    random_index = pick({draw() & ~1u, draw() | 1, ~draw(2 * kRun), 0u});
    for (uint32_t& key : random_keys) key = draw();
  }
};

inline std::vector<int> lengths() {
  std::vector<int> all = {1000, kTile - 1, kTile, 2 * kTile + 3, kRun - 1, kRun};
  for (int n = 1; n <= 70; ++n) all.push_back(n);
  return all;
}

}  // namespace cpu
}  // namespace rose
