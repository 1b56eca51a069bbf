// Capturing masks, the masked AdamW, and the norms of tensors.
#pragma once

#include "keys.cuh"

namespace rose {
namespace cuda {

ROSE_DEVICE Bounds read_bounds(const int64_t* selection) {
  return {(int32_t)selection[0], (int32_t)selection[1]};
}

// --------------------------------------------------------------------------------------------- capture

static __global__ void __launch_bounds__(kThreads) capture_kernel(CaptureArguments a) {
  const Bounds bounds = read_bounds(a.selection);
  const float inv_scale = scalar_or_one(a.risk.inv_scale);
  for_each_tile(a.risk.table, [&](int index, int64_t, int64_t start, int count) {
    uint8_t* const bits = a.risk.table.segments[index].bits;
    for_each_key(
        a.risk, inv_scale, a.risk.table.segments[index], start, count,
        [&](int i, const uint32_t (&keys)[kVector]) {
          unsigned half = 0;
#pragma unroll
          for (int j = 0; j < kVector; ++j) half |= (unsigned)if_selected(keys[j], bounds, 1) << j;
          // Two lanes have a byte between them.
          const unsigned byte = half | __shfl_down_sync(kFullWarp, half, 1) << kVector;
          if (keys[0] != kNoKey && lane() % 2 == 0) {
            write<uint8_t>(bits, (start + i) / 8, (uint8_t)byte);
          }
        },
        [&](int i, uint32_t key) {
          const unsigned word = __ballot_sync(kFullWarp, if_selected(key, bounds, 1) != 0);
          const int first = i - lane() + lane() * 8;  // of the byte that this lane writes
          if (lane() < kWarp / 8 && first < count) {
            write<uint8_t>(bits, (start + first) / 8, (uint8_t)(word >> (lane() * 8)));
          }
        });
  });
}

// ---------------------------------------------------------------------------------------------- update

// What all elements of a segment have in common, and its step. One thread for a segment.
static __global__ void __launch_bounds__(kThreads) prepare_kernel(UpdateArguments a) {
  const int i = (int)(blockIdx.x * kThreads + threadIdx.x);
  if (i == 0) a.counts[0] = a.counts[1] = 0;
  if (i >= a.table.count || (a.found_inf != nullptr && *a.found_inf != 0)) return;
  const Segment& segment = a.table.segments[i];
  const float step = *segment.step + 1.0f;
  *segment.step = step;
  Prepared& prepared = a.prepared[i];
  prepared.update = make_update(a.table.groups[segment.group], a.lr[segment.group], step, a.gamma);
  prepared.random_key = random_key(a.seed, (uint32_t)step);
  prepared.base_kind = segment.selective ? 0 : 3;
  for (int k = 0; k < 2; ++k) {
    const MaskKind kind = segment.mask_kinds[k];
    if (kind == MaskKind::kAll || (kind == MaskKind::kWhole && *segment.masks[k] != 0)) {
      prepared.base_kind += k == 0 ? a.first_weight : a.second_weight;
    }
  }
}

template <bool kFractional>
static __global__ void __launch_bounds__(kThreads, 4) update_kernel(UpdateArguments a) {
  __shared__ Count scratch[kThreads / kWarp];
  if (a.found_inf != nullptr && *a.found_inf != 0) return;
  const float inv_scale = scalar_or_one(a.inv_scale);
  const bool from_risk = a.selection != nullptr;
  const Bounds bounds = from_risk ? read_bounds(a.selection) : Bounds{-1, -1};
  unsigned updated = 0, nonfinite = 0;  // of one thread
  for_each_tile(a.table, [&](int index, int64_t, int64_t start, int count) {
    const Segment& segment = a.table.segments[index];
    // What is read through these where it is used, in L1, takes no register across the loop.
    const Prepared& prepared = a.prepared[index];
    // Bits of the masks from element i on.
    const auto mask_bits = [&](int k, int64_t i) {
      const bool has_bits = segment.mask_kinds[k] == MaskKind::kBits;
      return has_bits ? (unsigned)read<uint8_t>(segment.masks[k], i / 8) >> (i % 8) : 0u;
    };
    // Scales g; kind of the mask of one element, from the lowest bits of its masks.
    const auto kind_of = [&](float& g, float m, unsigned first, unsigned second) {
      g = mul(g, mul(segment.sign, inv_scale));
      int kind = prepared.base_kind;
      kind += (first & 1u) != 0 ? a.first_weight : 0;
      kind += (second & 1u) != 0 ? a.second_weight : 0;
      if (segment.selective) {
        if (from_risk) {
          const uint32_t key = second_order_key(g, m, segment.alpha, a.rank_inactive);
          kind += if_selected(key, bounds, a.second_weight);
        }
        if (abs_bits(g) >= kInfinityBits || abs_bits(m) >= kInfinityBits) {
          kind = 0;
          ++nonfinite;
        }
      }
      updated += kind != 0;
      return (unsigned)kind;
    };
    const auto random = [&](int64_t i) {
      const uint64_t at = (uint64_t)(segment.offset + i);
      return random_bits(prepared.random_key, (uint32_t)(at >> 32), (uint32_t)at);
    };

    const int vector = vector_part(segment, count);
#pragma unroll 1
    for (int i = threadIdx.x * kVector; i < vector; i += kThreads * kVector) {
      const int64_t at = start + i;
      const Raw raw_p = read_vector(segment.data[0], segment.dtype[0], at);
      const Raw raw_g = read_vector(segment.data[1], segment.dtype[1], at);
      const Raw raw_m = read_vector(segment.data[2], segment.dtype[2], at);
      const Raw raw_v = read_vector(segment.data[3], segment.dtype[3], at);
      const unsigned first = mask_bits(0, at), second = mask_bits(1, at);
      float p[kVector], g[kVector], m[kVector], v[kVector];
      widen(raw_p, segment.dtype[0], p);
      widen(raw_g, segment.dtype[1], g);
      widen(raw_m, segment.dtype[2], m);
      widen(raw_v, segment.dtype[3], v);
      unsigned kinds = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) kinds |= kind_of(g[j], m[j], first >> j, second >> j) << 2 * j;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        adamw_element<kFractional>(p[j], m[j], v[j], g[j], kinds >> 2 * j & 3, prepared.update);
      }
      write_vector(segment.data[0], segment.dtype[0], at, p);
      write_vector(segment.data[2], segment.dtype[2], at, m);
      if (segment.dtype[3] == Dtype::kFloat32) {
        write_vector(segment.data[3], Dtype::kFloat32, at, v);
      } else {
        uint16_t h[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) h[j] = float_to_bf16_stochastic(v[j], random(at + j));
        write<uint2>(segment.data[3], at / kVector, pack(h));
      }
    }
#pragma unroll 1
    for (int i = vector + threadIdx.x; i < count; i += kThreads) {
      const int64_t at = start + i;
      int64_t places[4];
      locate(a.table, segment, at, places);
      float p = read_element(segment.data[0], segment.dtype[0], places[0]);
      float g = read_element(segment.data[1], segment.dtype[1], places[1]);
      float m = read_element(segment.data[2], segment.dtype[2], places[2]);
      float v = read_element(segment.data[3], segment.dtype[3], places[3]);
      const unsigned kind = kind_of(g, m, mask_bits(0, at), mask_bits(1, at));
      adamw_element<kFractional>(p, m, v, g, kind, prepared.update);
      write_element(segment.data[0], segment.dtype[0], places[0], p);
      write_element(segment.data[2], segment.dtype[2], places[2], m);
      if (segment.dtype[3] == Dtype::kFloat32) {
        write<float>(segment.data[3], places[3], v);
      } else {
        write<uint16_t>(segment.data[3], places[3], float_to_bf16_stochastic(v, random(at)));
      }
    }
  });
  add_to(&a.counts[0], updated, scratch);
  add_to(&a.counts[1], nonfinite, scratch);
}

// ----------------------------------------------------------------------------------------------- norms

// Sums of squares of the tiles. A thread has the same elements whatever the layout, and sums have a
// fixed order, so a norm does not depend on where its tensor lies.
static __global__ void __launch_bounds__(kThreads) squares_kernel(NormArguments a) {
  __shared__ double scratch[kThreads / kWarp];
  const float inv_scale = scalar_or_one(a.inv_scale);
  for_each_tile(a.table, [&](int index, int64_t tile, int64_t start, int count) {
    const Segment& segment = a.table.segments[index];
    const Dtype dtype = segment.dtype[0];
    const int vector = vector_part(segment, count);
    double sum = 0.0;
    const auto add_square = [&](float x) {
      x = mul(x, inv_scale);
      sum += (double)x * (double)x;  // the product is exact
    };
    for (int i = threadIdx.x * kVector; i < count; i += kThreads * kVector) {
      if (i < vector) {
        float x[kVector];
        widen(read_vector(segment.data[0], dtype, start + i), dtype, x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) add_square(x[j]);
      } else {
#pragma unroll 1
        for (int j = i; j < i + kVector && j < count; ++j) {
          int64_t place[1];
          locate(a.table, segment, start + j, place);
          add_square(read_element(segment.data[0], dtype, place[0]));
        }
      }
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) a.partial[tile] = sum;
  });
}

// The norm of each segment from its tiles. One block for a segment.
static __global__ void __launch_bounds__(kThreads) norms_kernel(NormArguments a) {
  __shared__ double scratch[kThreads / kWarp];
  for (int index = (int)blockIdx.x; index < a.table.count; index += (int)gridDim.x) {
    const Segment& segment = a.table.segments[index];
    const int64_t tiles = (segment.n + kTile - 1) / kTile;
    double sum = 0.0;
    for (int64_t t = threadIdx.x; t < tiles; t += kThreads) sum += a.partial[segment.first_tile + t];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) a.norms[index] = (float)sqrt(sum);
  }
}

}  // namespace cuda
}  // namespace rose
