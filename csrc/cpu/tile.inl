// The loops of tile.h for one instruction set: ROSE_ISA names it, and the including file has set the
// compiler's target. Nothing here may call a library template: see element.h on linkage.

namespace rose {
namespace cpu {
namespace {

// What takes several loops takes them in blocks so short that the CPU reads the next block from memory
// while it computes this one. (In one loop, compilers give up on vectorizing.)
constexpr int kBlock = 128;

// fn(first element, elements) for each block; inlined, so that the length is a constant but for the
// last.
template <typename Fn>
ROSE_INLINE void for_each_block(int n, Fn fn) {
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) fn(i, kBlock);
  if (i < n) fn(i, n - i);
}

template <typename Load>
ROSE_INLINE void widen_with(int64_t stride, int n, float* __restrict dst, Load load) {
  if (stride == 1) {
    for (int i = 0; i < n; ++i) dst[i] = load(i);
  } else {
    for (int i = 0; i < n; ++i) dst[i] = load(i * stride);
  }
}

void widen(const void* src, Dtype dtype, int64_t stride, int n, float* dst) {
  const float* f = static_cast<const float*>(src);
  const uint16_t* h = static_cast<const uint16_t*>(src);
  switch (dtype) {
    case Dtype::kFloat32:
      return widen_with(stride, n, dst, [=](int64_t i) { return f[i]; });
    case Dtype::kBFloat16:
      return widen_with(stride, n, dst, [=](int64_t i) { return bf16_to_float(h[i]); });
    case Dtype::kFloat16:
      return widen_with(stride, n, dst, [=](int64_t i) { return half_to_float(h[i]); });
  }
}

template <typename T, typename Convert>
ROSE_INLINE void narrow_with(const float* __restrict src, int64_t stride, int n, T* __restrict dst,
                             Convert convert) {
  if (stride == 1) {
    for (int i = 0; i < n; ++i) dst[i] = convert(src[i], i);
  } else {
    for (int i = 0; i < n; ++i) dst[i * stride] = convert(src[i], i);
  }
}

void narrow(const float* src, Dtype dtype, int64_t stride, int n, void* dst) {
  float* f = static_cast<float*>(dst);
  uint16_t* h = static_cast<uint16_t*>(dst);
  switch (dtype) {
    case Dtype::kFloat32:
      return narrow_with(src, stride, n, f, [](float x, int) { return x; });
    case Dtype::kBFloat16:
      return narrow_with(src, stride, n, h, [](float x, int) { return float_to_bf16(x); });
    case Dtype::kFloat16:
      return narrow_with(src, stride, n, h, [](float x, int) { return float_to_half(x); });
  }
}

void narrow_stochastic(const float* src, int64_t stride, int n, void* dst, uint32_t key,
                       uint32_t index_high, uint32_t index_low) {
  narrow_with(src, stride, n, static_cast<uint16_t*>(dst), [=](float x, int i) {
    return float_to_bf16_stochastic(x, random_bits(key, index_high, index_low + (uint32_t)i));
  });
}

void scale(const float* __restrict src, float factor, int n, float* __restrict dst) {
  for (int i = 0; i < n; ++i) dst[i] = mul(src[i], factor);
}

ROSE_INLINE void block_keys(const Risk& risk, int at, int n, uint32_t* __restrict keys) {
  const float* __restrict g = risk.g + at;
  const float* __restrict m = risk.m ? risk.m + at : nullptr;
  const float alpha = risk.alpha;
  if (!risk.m) {
    for (int i = 0; i < n; ++i) keys[i] = first_order_key(g[i], risk.rank_inactive);
  } else if (risk.rank_inactive) {
    for (int i = 0; i < n; ++i) keys[i] = second_order_key(g[i], m[i], alpha, true);
  } else {
    for (int i = 0; i < n; ++i) keys[i] = second_order_key(g[i], m[i], alpha, false);
  }
}

void keys(const Risk& risk, int n, uint32_t* out) { block_keys(risk, 0, n, out); }

// Sixteen keys at a time, as a mask with one bit per key: what compilers do not find by themselves.
template <typename Fn>
ROSE_INLINE void for_each_16(int n, Fn fn) {
  int i = 0;
  for (; i + 16 <= n; i += 16) fn(i, 16);
  if (i < n) fn(i, n - i);
}

// Bit j: lo <= keys[j] <= lo + span.
ROSE_INLINE uint32_t lanes_in_range(const uint32_t* keys, int lanes, uint32_t lo, uint32_t span) {
#if ROSE_VECTOR_BITS == 512
  const __mmask16 mask = (__mmask16)((1u << lanes) - 1);
  const __m512i offset =
      _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, keys), _mm512_set1_epi32((int)lo));
  return _mm512_mask_cmple_epu32_mask(mask, offset, _mm512_set1_epi32((int)span));
#else
  uint32_t inside = 0;
#if ROSE_VECTOR_BITS == 256
  if (lanes == 16) {
    const __m256i base = _mm256_set1_epi32((int)lo), bound = _mm256_set1_epi32((int)span);
    for (int half = 0; half < 2; ++half) {
      const __m256i key = _mm256_loadu_si256((const __m256i*)(keys + 8 * half));
      const __m256i offset = _mm256_sub_epi32(key, base);
      const __m256i within = _mm256_cmpeq_epi32(_mm256_min_epu32(offset, bound), offset);
      inside |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(within)) << (8 * half);
    }
    return inside;
  }
#endif
  for (int j = 0; j < lanes; ++j) inside |= (uint32_t)(keys[j] - lo <= span) << j;
  return inside;
#endif
}

// Appends the keys whose bits are set, and returns how many; `out` has room for 16.
ROSE_INLINE int append(const uint32_t* keys, uint32_t set, uint32_t* out) {
#if ROSE_VECTOR_BITS == 512
  // Compressed in a register: the form that stores to memory is microcoded on some CPUs.
  _mm512_storeu_si512(
      out, _mm512_maskz_compress_epi32((__mmask16)set, _mm512_maskz_loadu_epi32((__mmask16)set, keys)));
  return __builtin_popcount(set);
#else
  int count = 0;
  for (; set != 0; set &= set - 1) out[count++] = keys[__builtin_ctz(set)];
  return count;
#endif
}

void histogram(const Risk& risk, int n, uint32_t* __restrict counts) {
  for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
    uint32_t keys[kBlock];
    block_keys(risk, at, n, keys);
    int i = 0;
    for (; i + kHistogramCopies <= n; i += kHistogramCopies) {
      for (int copy = 0; copy < kHistogramCopies; ++copy) {
        ++counts[copy * kDigitBins + (keys[i + copy] >> kDigitShift)];
      }
    }
    for (; i < n; ++i) ++counts[keys[i] >> kDigitShift];
  });
}

void scan(const Risk& risk, int n, ClassCounts& classes, WindowLog* windows, int count) {
  int ranked = 0, inactive = 0;
  for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
    uint32_t keys[kBlock];
    block_keys(risk, at, n, keys);
    for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
      const uint32_t in_ranking = lanes_in_range(keys + start, lanes, 0, kInactiveKey - 1);
      ranked += __builtin_popcount(in_ranking);
      if (in_ranking != (1u << lanes) - 1) {
        inactive += __builtin_popcount(lanes_in_range(keys + start, lanes, kInactiveKey, 0));
      }
    });
    for (int w = 0; w < count; ++w) {
      const Window window = windows[w].window;
      uint32_t* log = windows[w].log + windows[w].logged;
      int below_end = 0, at_pivot = 0, logged = 0;
      for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
        // Below the end, less what is inside: below `lo` itself has no range if lo is 0.
        below_end += __builtin_popcount(lanes_in_range(keys + start, lanes, 0, window.hi));
        const uint32_t inside = lanes_in_range(keys + start, lanes, window.lo, window.hi - window.lo);
        const uint32_t pivots = lanes_in_range(keys + start, lanes, window.pivot, 0);
        at_pivot += __builtin_popcount(pivots);
        logged += append(keys + start, inside & ~pivots, log + logged);
      });
      windows[w].below += below_end - at_pivot - logged;
      windows[w].at_pivot += at_pivot;
      windows[w].logged += logged;
    }
  });
  classes.ranked += ranked;
  classes.inactive += inactive;
  classes.nonfinite += n - ranked - inactive;
}

int filter(const Risk& risk, int n, uint32_t prefix, int shift, uint32_t* __restrict out) {
  int matches = 0;
  for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
    uint32_t keys[kBlock];
    block_keys(risk, at, n, keys);
    for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
      const uint32_t match = lanes_in_range(keys + start, lanes, prefix << shift, (1u << shift) - 1);
      matches += append(keys + start, match, out + matches);
    });
  });
  return matches;
}

void pack(const Risk& risk, int n, Bounds bounds, uint8_t* __restrict bits) {
  // low < key <= high as one unsigned range, which is empty if low >= high.
  const uint32_t first = (uint32_t)(bounds.low + 1), span = (uint32_t)(bounds.high - bounds.low - 1);
  const uint32_t any = bounds.low < bounds.high ? ~0u : 0u;
  for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
    uint32_t keys[kBlock];
    block_keys(risk, at, n, keys);
    uint8_t* __restrict out = bits + at / 8;
    for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
      const uint32_t selected = (lanes_in_range(keys + start, lanes, first, span) & any) |
                                lanes_in_range(keys + start, lanes, kInactiveKey, 0);
      out[start / 8] = (uint8_t)selected;
      if (lanes > 8) out[start / 8 + 1] = (uint8_t)(selected >> 8);
    });
  });
}

void adamw(float* __restrict p, float* __restrict m, float* __restrict v, const float* __restrict g,
           int n, const Update& update) {
  const Update u = update;
  for (int i = 0; i < n; ++i) adamw_element<false>(p[i], m[i], v[i], g[i], 3, u);
}

ROSE_INLINE void add_bits(const uint8_t* __restrict bits, int32_t weight, int n,
                          int32_t* __restrict kinds) {
  int i = 0;
#if ROSE_VECTOR_BITS == 512
  const __m512i weights = _mm512_set1_epi32(weight);
  for (; i + 16 <= n; i += 16) {
    const __mmask16 set = (__mmask16)(bits[i / 8] | bits[i / 8 + 1] << 8);
    const __m512i old = _mm512_loadu_si512(kinds + i);
    _mm512_storeu_si512(kinds + i, _mm512_mask_add_epi32(old, set, old, weights));
  }
#else
  for (; i + 8 <= n; i += 8) {
    const int32_t byte = bits[i / 8];
    for (int j = 0; j < 8; ++j) kinds[i + j] += (byte >> j & 1) * weight;
  }
#endif
  for (; i < n; ++i) kinds[i] += (bits[i / 8] >> (i % 8) & 1) * weight;
}

template <bool kFractional>
ROSE_INLINE void masked_block(float* __restrict p, float* __restrict m, float* __restrict v,
                              const float* __restrict g, const Masks& masks, int at, int n,
                              const Update& u, UpdateCounts& counts) {
  int32_t kinds[kBlock];
  for (int i = 0; i < n; ++i) kinds[i] = masks.base;
  if (masks.first_bits) add_bits(masks.first_bits + at / 8, masks.first_weight, n, kinds);
  if (masks.second_bits) add_bits(masks.second_bits + at / 8, masks.second_weight, n, kinds);
  if (masks.from_risk) {
    uint32_t keys[kBlock];
    block_keys({g, m, masks.alpha, masks.rank_inactive}, 0, n, keys);
    for (int i = 0; i < n; ++i) kinds[i] += if_selected(keys[i], masks.bounds, masks.second_weight);
  }
  int32_t updated = 0, nonfinite = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t ag = abs_bits(g[i]), am = abs_bits(m[i]);
    const int32_t finite = (ag > am ? ag : am) < kInfinityBits ? -1 : 0;
    kinds[i] &= finite;
    updated += kinds[i] != 0;
    nonfinite += 1 + finite;
  }
  counts.updated += updated;
  counts.nonfinite += nonfinite;
  for (int i = 0; i < n; ++i) adamw_element<kFractional>(p[i], m[i], v[i], g[i], kinds[i], u);
}

void masked_adamw(float* p, float* m, float* v, const float* g, const Masks& masks, int n,
                  const Update& update, UpdateCounts& counts) {
  const Update u = update;
  const Masks local = masks;
  if (masks.fractional) {
    for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
      masked_block<true>(p + at, m + at, v + at, g + at, local, at, n, u, counts);
    });
  } else {
    for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
      masked_block<false>(p + at, m + at, v + at, g + at, local, at, n, u, counts);
    });
  }
}

// Sixteen lanes in a fixed order, so that every instruction set and every thread count agrees.
double sum_of_squares(const float* __restrict x, int n) {
  double lanes[16] = {};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) lanes[j] += (double)x[i + j] * (double)x[i + j];
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += (double)x[i] * (double)x[i];
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

}  // namespace

extern const TileKernels ROSE_ISA;
const TileKernels ROSE_ISA = {
    ROSE_ISA_NAME, widen, narrow, narrow_stochastic, scale,          keys, histogram, scan,
    filter,        pack,  adamw,  masked_adamw,      sum_of_squares,
};

}  // namespace cpu
}  // namespace rose
