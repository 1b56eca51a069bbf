// Risk keys of a tile, recomputed from gradients and moments whenever they are needed.
#pragma once

#include "access.cuh"

namespace rose {
namespace cuda {

constexpr uint32_t kNoKey = 0xFFFFFFFFu;  // of a lane without an element

// What gradients are multiplied by, one after the other.
struct Factors {
  float inv_scale, clip;
};

ROSE_DEVICE Factors factors_of(const Risk& risk) {
  return {scalar_or_one(risk.inv_scale), scalar_or_one(risk.clip)};
}

ROSE_DEVICE uint32_t key_of(const Risk& risk, Factors factors, float alpha, float g, float m) {
  g = mul(mul(g, factors.inv_scale), factors.clip);
  return risk.second_order ? second_order_key(g, m, alpha, risk.rank_inactive)
                           : first_order_key(g, risk.rank_inactive);
}

ROSE_DEVICE uint32_t key_at(const Risk& risk, Factors factors, const Segment& segment, int64_t i) {
  int64_t places[2];
  locate(risk.table, segment, i, places, risk.operand);
  const char* const* data = segment.data + risk.operand;
  const Dtype* dtype = segment.dtype + risk.operand;
  const float g = read_element(data[0], dtype[0], places[0]);
  float m = 0.0f;
  if (risk.second_order) m = read_element(data[1], dtype[1], places[1]);
  return key_of(risk, factors, segment.alpha, g, m);
}

// vector(i, keys) for the elements i.. that are read kVector at a time and single(i, key) for the
// others, of a tile's `count` elements from `start` on. Always by whole warps.
template <typename Vector, typename Single>
ROSE_DEVICE void for_each_key(const Risk& risk, Factors factors, const Segment& segment, int64_t start,
                              int count, Vector vector, Single single) {
  const int vectors = vector_part(segment, count);
  const char* const* data = segment.data + risk.operand;
  const Dtype* dtype = segment.dtype + risk.operand;
#pragma unroll 1
  for (int base = warp() * kWarp * kVector; base < vectors; base += kThreads * kVector) {
    const int i = base + lane() * kVector;
    uint32_t keys[kVector] = {kNoKey, kNoKey, kNoKey, kNoKey};
    if (i < vectors) {
      const Raw raw_g = read_vector(data[0], dtype[0], start + i);
      Raw raw_m = {};
      if (risk.second_order) raw_m = read_vector(data[1], dtype[1], start + i);
      float g[kVector], m[kVector];
      widen(raw_g, dtype[0], g);
      widen(raw_m, dtype[1], m);
#pragma unroll
      for (int j = 0; j < kVector; ++j) keys[j] = key_of(risk, factors, segment.alpha, g[j], m[j]);
    }
    vector(i, keys);
  }
#pragma unroll 1
  for (int base = vectors + warp() * kWarp; base < count; base += kThreads) {
    const int i = base + lane();
    single(i, i < count ? key_at(risk, factors, segment, start + i) : kNoKey);
  }
}

// body(key) for every ranked element of this block's share, by whole warps.
template <typename Body>
ROSE_DEVICE void for_each_key(const Risk& risk, Body body) {
  const Factors factors = factors_of(risk);
  for_each_tile(risk.table, [&](int index, int64_t, int64_t start, int count) {
    const Segment& segment = risk.table.segments[index];
    if (!segment.selective) return;
    for_each_key(
        risk, factors, segment, start, count,
        [&](int, const uint32_t (&keys)[kVector]) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) body(keys[j]);
        },
        [&](int, uint32_t key) { body(key); });
  });
}

}  // namespace cuda
}  // namespace rose
