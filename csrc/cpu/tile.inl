// The loops of tile.h for one instruction set: ROSE_ISA names it, and the including file has set the
// compiler's target. Nothing here may call a library template: see element.h on linkage.

namespace rose {
namespace cpu {
namespace {

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

void first_order_keys(const float* __restrict g, bool rank_inactive, int n, uint32_t* __restrict keys) {
  for (int i = 0; i < n; ++i) keys[i] = first_order_key(g[i], rank_inactive);
}

void second_order_keys(const float* __restrict g, const float* __restrict m, float alpha,
                       bool rank_inactive, int n, uint32_t* __restrict keys) {
  if (rank_inactive) {
    for (int i = 0; i < n; ++i) keys[i] = second_order_key(g[i], m[i], alpha, true);
  } else {
    for (int i = 0; i < n; ++i) keys[i] = second_order_key(g[i], m[i], alpha, false);
  }
}

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
  if (set == 0) return 0;
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

void histogram(const uint32_t* __restrict keys, int n, uint32_t* __restrict counts) {
  int i = 0;
  for (; i + kHistogramCopies <= n; i += kHistogramCopies) {
    for (int copy = 0; copy < kHistogramCopies; ++copy) {
      ++counts[copy * kDigitBins + (keys[i + copy] >> kDigitShift)];
    }
  }
  for (; i < n; ++i) ++counts[keys[i] >> kDigitShift];
}

void count_classes(const uint32_t* __restrict keys, int n, ClassCounts& counts) {
  int32_t ranked = 0, inactive = 0;
  for (int i = 0; i < n; ++i) {
    ranked += keys[i] < kInactiveKey;
    inactive += keys[i] == kInactiveKey;
  }
  counts.ranked += ranked;
  counts.inactive += inactive;
  counts.nonfinite += n - ranked - inactive;
}

int window(const uint32_t* __restrict keys, int n, Window w, WindowCounts& counts,
           uint32_t* __restrict log) {
  const uint32_t span = w.hi - w.lo;
  int32_t below = 0, at_pivot = 0;
  for (int i = 0; i < n; ++i) {
    below += keys[i] < w.lo;
    at_pivot += keys[i] == w.pivot;
  }
  counts.below += below;
  counts.at_pivot += at_pivot;
  int logged = 0;
  for_each_16(n, [&](int start, int lanes) {
    const uint32_t inside = lanes_in_range(keys + start, lanes, w.lo, span) &
                            ~lanes_in_range(keys + start, lanes, w.pivot, 0);
    logged += append(keys + start, inside, log + logged);
  });
  return logged;
}

int filter(const uint32_t* __restrict keys, int n, uint32_t prefix, int shift,
           uint32_t* __restrict out) {
  int matches = 0;
  for_each_16(n, [&](int start, int lanes) {
    const uint32_t match = lanes_in_range(keys + start, lanes, prefix << shift, (1u << shift) - 1);
    matches += append(keys + start, match, out + matches);
  });
  return matches;
}

void pack(const uint32_t* __restrict keys, int n, Bounds bounds, uint8_t* __restrict bits) {
  // low < key <= high as one unsigned range, which is empty if low >= high.
  const uint32_t first = (uint32_t)(bounds.low + 1), span = (uint32_t)(bounds.high - bounds.low - 1);
  const uint32_t any = bounds.low < bounds.high ? ~0u : 0u;
  for_each_16(n, [&](int start, int lanes) {
    const uint32_t selected = (lanes_in_range(keys + start, lanes, first, span) & any) |
                              lanes_in_range(keys + start, lanes, kInactiveKey, 0);
    bits[start >> 3] = (uint8_t)selected;
    if (lanes > 8) bits[(start >> 3) + 1] = (uint8_t)(selected >> 8);
  });
}

void kinds_from_bits(const uint8_t* __restrict bits, int weight, int n, int32_t* __restrict kinds) {
  int i = 0;
#if ROSE_VECTOR_BITS == 512
  const __m512i weights = _mm512_set1_epi32(weight);
  for (; i + 16 <= n; i += 16) {
    const __mmask16 set = (__mmask16)(bits[i >> 3] | bits[(i >> 3) + 1] << 8);
    const __m512i old = _mm512_loadu_si512(kinds + i);
    _mm512_storeu_si512(kinds + i, _mm512_mask_add_epi32(old, set, old, weights));
  }
#else
  for (; i + 8 <= n; i += 8) {
    const int32_t byte = bits[i >> 3];
    for (int j = 0; j < 8; ++j) kinds[i + j] += (byte >> j & 1) * weight;
  }
#endif
  for (; i < n; ++i) kinds[i] += (bits[i >> 3] >> (i & 7) & 1) * weight;
}

void kinds_from_keys(const uint32_t* __restrict keys, Bounds bounds, int weight, int n,
                     int32_t* __restrict kinds) {
  for (int i = 0; i < n; ++i) kinds[i] += if_selected(keys[i], bounds, weight);
}

void adamw(float* __restrict p, float* __restrict m, float* __restrict v, const float* __restrict g,
           int n, const Update& update) {
  const Update u = update;
  for (int i = 0; i < n; ++i) adamw_element<false>(p[i], m[i], v[i], g[i], 3, u);
}

void mask_nonfinite(const float* __restrict g, const float* __restrict m, int n,
                    int32_t* __restrict kinds, UpdateCounts& counts) {
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
}

template <bool kFractional>
ROSE_INLINE void masked(float* __restrict p, float* __restrict m, float* __restrict v,
                        const float* __restrict g, const int32_t* __restrict kinds, int n,
                        const Update& update) {
  const Update u = update;
  for (int i = 0; i < n; ++i) adamw_element<kFractional>(p[i], m[i], v[i], g[i], kinds[i], u);
}

void masked_adamw(float* p, float* m, float* v, const float* g, const int32_t* kinds, bool fractional,
                  int n, const Update& update) {
  if (fractional) {
    masked<true>(p, m, v, g, kinds, n, update);
  } else {
    masked<false>(p, m, v, g, kinds, n, update);
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
    ROSE_ISA_NAME,
    widen,
    narrow,
    narrow_stochastic,
    scale,
    first_order_keys,
    second_order_keys,
    histogram,
    count_classes,
    window,
    filter,
    pack,
    kinds_from_bits,
    kinds_from_keys,
    mask_nonfinite,
    adamw,
    masked_adamw,
    sum_of_squares,
};

}  // namespace cpu
}  // namespace rose
