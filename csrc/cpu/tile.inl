// The loops of tile.h for one instruction set: ROSE_ISA names it, and the including file has set the
// compiler's target. Nothing here may call a library template: see element.h on linkage.

namespace rose {
namespace cpu {
namespace {

// What takes several loops takes them in blocks so short that the CPU reads the next block from memory
// while it computes this one. (In one loop, compilers give up on vectorizing, and fewer elements are on
// their way at a time.) A block's masks are the bits of one word.
constexpr int kBlock = 64;

// fn(first element, elements) for each block; inlined, so that the length is a constant but for the
// last.
template <typename Fn>
ROSE_INLINE void for_each_block(int n, Fn fn) {
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) fn(i, kBlock);
  if (i < n) fn(i, n - i);
}

// For passes that only read: a block one tile ahead. What the CPU fetches by itself ends with the page.
ROSE_INLINE void prefetch_ahead(const float* x) {
  for (int i = 0; i < kBlock; i += kLine) __builtin_prefetch(x + kTile + i);
}

ROSE_INLINE void prefetch_ahead(const Risk& risk, int at) {
  prefetch_ahead(risk.g + at);
  if (risk.m) prefetch_ahead(risk.m + at);
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

void narrow_stochastic(const float* src, int64_t stride, int n, void* dst, uint32_t key, uint64_t index,
                       Rounded what) {
  const uint32_t high = (uint32_t)(index >> 32);
  for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
    const uint32_t low = (uint32_t)index + (uint32_t)at, first = rounding_word(low, what);
    uint32_t words[kBlock / 2 + 1];
    for (int i = 0; i < kBlock / 2; ++i) words[i] = random_bits(key, high, first + 2 * (uint32_t)i);
    words[kBlock / 2] = low & 1 ? random_bits(key, high, first + kBlock) : 0;
    typedef uint16_t __attribute__((may_alias)) Half;  // the lower one comes first in memory
    const Half* __restrict own = (const Half*)words + (low & 1);
    narrow_with(src + at, stride, n, static_cast<uint16_t*>(dst) + at * stride,
                [=](float x, int i) { return float_to_bf16_stochastic(x, own[i]); });
  });
}

ROSE_INLINE void scale(const float* __restrict src, float first, float second, int n,
                       float* __restrict dst) {
  for (int i = 0; i < n; ++i) dst[i] = mul(mul(src[i], first), second);
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

// ---------------------------------------------------------------------------------------------- lanes

// Several elements at once, and conditions on them from the bits of a word.
#if ROSE_VECTOR_BITS == 0
constexpr int kLanes = 1;
typedef float Lanes;
typedef bool Condition;
ROSE_INLINE Lanes load_lanes(const float* x) { return *x; }
ROSE_INLINE void store_lanes(float* x, Lanes a) { *x = a; }
ROSE_INLINE Lanes all_lanes(float x) { return x; }
ROSE_INLINE Condition condition(uint32_t bits) { return (bits & 1) != 0; }
ROSE_INLINE Lanes magnitude(Lanes a) { return bits_float(abs_bits(a)); }
ROSE_INLINE Condition at_most(Lanes a, Lanes b) { return a <= b; }
ROSE_INLINE Condition less(Lanes a, Lanes b) { return a < b; }
ROSE_INLINE Condition both(Condition a, Condition b) { return a & b; }
ROSE_INLINE Condition either(Condition a, Condition b) { return a | b; }
ROSE_INLINE uint32_t bits_of(Condition c) { return c; }
#else
#if ROSE_VECTOR_BITS == 512
constexpr int kLanes = 16;
struct Lanes {
  __m512 x;
};
struct Condition {
  __mmask16 mask;
};
ROSE_INLINE Lanes load_lanes(const float* x) { return {_mm512_loadu_ps(x)}; }
ROSE_INLINE void store_lanes(float* x, Lanes a) { _mm512_storeu_ps(x, a.x); }
ROSE_INLINE Lanes all_lanes(float x) { return {_mm512_set1_ps(x)}; }
ROSE_INLINE Lanes root(Lanes a) { return {_mm512_sqrt_ps(a.x)}; }
ROSE_INLINE Condition condition(uint32_t bits) { return {(__mmask16)bits}; }
ROSE_INLINE Lanes choose(Condition c, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps(c.mask, b.x, a.x)};
}
ROSE_INLINE Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.x)}; }
// Not where a lane is NaN.
ROSE_INLINE Condition at_most(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LE_OQ)}; }
ROSE_INLINE Condition less(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ)}; }
ROSE_INLINE Condition both(Condition a, Condition b) { return {(__mmask16)(a.mask & b.mask)}; }
ROSE_INLINE Condition either(Condition a, Condition b) { return {(__mmask16)(a.mask | b.mask)}; }
ROSE_INLINE uint32_t bits_of(Condition c) { return c.mask; }
#else
constexpr int kLanes = 8;
struct Lanes {
  __m256 x;
};
struct Condition {
  __m256 mask;
};
ROSE_INLINE Lanes load_lanes(const float* x) { return {_mm256_loadu_ps(x)}; }
ROSE_INLINE void store_lanes(float* x, Lanes a) { _mm256_storeu_ps(x, a.x); }
ROSE_INLINE Lanes all_lanes(float x) { return {_mm256_set1_ps(x)}; }
ROSE_INLINE Lanes root(Lanes a) { return {_mm256_sqrt_ps(a.x)}; }
ROSE_INLINE Condition condition(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i own = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lane))};
}
ROSE_INLINE Lanes choose(Condition c, Lanes a, Lanes b) { return {_mm256_blendv_ps(b.x, a.x, c.mask)}; }
ROSE_INLINE Lanes magnitude(Lanes a) {
  return {_mm256_and_ps(a.x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)))};
}
ROSE_INLINE Condition at_most(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_LE_OQ)}; }
ROSE_INLINE Condition less(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ)}; }
ROSE_INLINE Condition both(Condition a, Condition b) { return {_mm256_and_ps(a.mask, b.mask)}; }
ROSE_INLINE Condition either(Condition a, Condition b) { return {_mm256_or_ps(a.mask, b.mask)}; }
ROSE_INLINE uint32_t bits_of(Condition c) { return (uint32_t)_mm256_movemask_ps(c.mask); }
#endif
ROSE_INLINE Lanes operator*(Lanes a, Lanes b) { return {a.x * b.x}; }
ROSE_INLINE Lanes operator+(Lanes a, Lanes b) { return {a.x + b.x}; }
ROSE_INLINE Lanes operator-(Lanes a, Lanes b) { return {a.x - b.x}; }
ROSE_INLINE Lanes operator/(Lanes a, Lanes b) { return {a.x / b.x}; }
ROSE_INLINE Lanes operator*(float a, Lanes b) { return all_lanes(a) * b; }
ROSE_INLINE Lanes operator*(Lanes a, float b) { return a * all_lanes(b); }
ROSE_INLINE Lanes operator+(Lanes a, float b) { return a + all_lanes(b); }
#endif

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

ROSE_INLINE uint64_t lowest_bits(int n) { return n < 64 ? ((uint64_t)1 << n) - 1 : ~(uint64_t)0; }

// The first n bits of a captured mask.
ROSE_INLINE uint64_t load_bits(const uint8_t* bytes, int n) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, bytes, (size_t)(n + 7) / 8);
  return bits & lowest_bits(n);
}

template <typename Fn>
ROSE_INLINE void for_each_set(uint64_t bits, Fn fn) {
  for (; bits != 0; bits &= bits - 1) fn(__builtin_ctzll(bits));
}

// Second-order risks between two values `low` <= `high`, without a division. With a = alpha |g| and
// b = |m|, a risk of at most x is |a - b| <= x b but for roundings: u = 2^-24 of each operation, and of
// the quotient where that is near 1. Widened by more than these (8 u x + 2 u), the comparison is sure
// of its answer. Moments so small that products would lose digits, and what is not finite, are never
// sure.
struct Sides {
  float below,
      above;  // surely less than `low`: |a - b| <= below b; surely greater than `high`: > above b
  // Where a gradient is zero and the moment is not, the risk is exactly 1.
  bool ties_below, ties_at_pivot, ties_above;
};
constexpr float kSmallMoment = 0x1p-100f, kLargeDifference = 0x1p127f;

ROSE_INLINE Sides sides_of_bracket(Bracket bracket) {
  const double u = 0x1p-24;
  const int32_t low = bracket.low, high = bracket.high, one = 0x3F800000;
  const double x = (double)bits_float((uint32_t)(low > 0 ? low : 0)) * (1 - 8 * u) - 2 * u;
  const double y = (double)bits_float((uint32_t)(high > 0 ? high : 0)) * (1 + 8 * u) + 2 * u;
  return {x > 0x1p-20 ? (float)x : -1.0f, high < 0 ? -1.0f : (float)(y * (1 + u)),
          one<low, one == bracket.pivot, one> high};
}

// Surely below; surely one or the other.
struct SidesOfLanes {
  Condition below, sure;
};

ROSE_INLINE SidesOfLanes sides_of(Lanes g, Lanes m, float alpha, Sides sides) {
  const Lanes b = magnitude(m), s = magnitude(sub(mul(alpha, magnitude(g)), b));
  const Condition fit = both(at_most(all_lanes(kSmallMoment), b), less(s, all_lanes(kLargeDifference)));
  const Condition below = both(at_most(s, mul(b, sides.below)), fit);
  return {below, either(below, both(less(mul(b, sides.above), s), fit))};
}

// Surely above although the moment, which is not 0, is small: it would be if that were larger.
ROSE_INLINE Condition above_if_small(Lanes g, Lanes m, float alpha, Sides sides) {
  const Lanes small = all_lanes(kSmallMoment), b = magnitude(m);
  const Lanes s = magnitude(sub(mul(alpha, magnitude(g)), b));
  return both(both(less(mul(small, sides.above), s), less(s, all_lanes(kLargeDifference))),
              less(b, small));
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
    prefetch_ahead(risk, at);
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
    prefetch_ahead(risk, at);
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
    prefetch_ahead(risk, at);
    uint32_t keys[kBlock];
    block_keys(risk, at, n, keys);
    for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
      const uint32_t match = lanes_in_range(keys + start, lanes, prefix << shift, (1u << shift) - 1);
      matches += append(keys + start, match, out + matches);
    });
  });
  return matches;
}

// Bits of those within bounds, or inactive.
ROSE_INLINE uint32_t selected_of_16(const uint32_t* keys, int lanes, Bounds bounds) {
  // low < key <= high as one unsigned range, which is empty if low >= high.
  const uint32_t first = (uint32_t)(bounds.low + 1), span = (uint32_t)(bounds.high - bounds.low - 1);
  const uint32_t inside = bounds.low < bounds.high ? lanes_in_range(keys, lanes, first, span) : 0;
  return inside | lanes_in_range(keys, lanes, kInactiveKey, 0);
}

LineCounts count_line(const uint32_t* keys, int n, const Window& window, uint32_t* inside) {
  const uint32_t within = lanes_in_range(keys, n, window.lo, window.hi - window.lo);
  const auto upto = [&](uint32_t key) ROSE_ALWAYS_INLINE {
    return __builtin_popcount(lanes_in_range(keys, n, 0, key));
  };
  return {upto(kInactiveKey - 1), window.lo > 0 ? upto(window.lo - 1) : 0, upto(window.pivot),
          append(keys, within, inside)};
}

// fn(start, lanes, keys without their sign bits) for each 16 logged keys.
template <typename Fn>
ROSE_INLINE void for_each_16_logged(const uint32_t* logged, int n, Fn fn) {
  for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
    uint32_t keys[kLine];
    for (int i = 0; i < lanes; ++i) keys[i] = logged[start + i] & ~kInactiveKey;
    fn(start, lanes, keys);
  });
}

int logged_between(const uint32_t* keys, int n, uint32_t low, uint32_t span, uint32_t* out) {
  int count = 0;
  for_each_16_logged(keys, n, [&](int, int lanes, const uint32_t* key) ROSE_ALWAYS_INLINE {
    count += append(key, lanes_in_range(key, lanes, low, span), out + count);
  });
  return count;
}

int logged_wrongly(const uint32_t* keys, int n, Bounds bounds, int* places) {
  int count = 0;
  for_each_16_logged(keys, n, [&](int start, int lanes, const uint32_t* key) ROSE_ALWAYS_INLINE {
    const uint32_t was = lanes_in_range(keys + start, lanes, kInactiveKey, ~kInactiveKey);
    for_each_set(was ^ selected_of_16(key, lanes, bounds),
                 [&](int i) ROSE_ALWAYS_INLINE { places[count++] = start + i; });
  });
  return count;
}

// Of a block that is updated; null where none is.
struct Elements {
  const float *p, *m, *v, *g;
};

ROSE_INLINE void log_element(uint32_t key, const Elements& x, int at, int i, Bounds bounds,
                             BracketLog& log) {
  const int64_t to = log.logged++;
  log.keys[to] = key | (uint32_t)if_selected(key, bounds, 1) << 31;
  log.places[to] = log.place + at + i;
  if (log.old) {
    log.old[to][0] = x.p[i];
    log.old[to][1] = x.m[i];
    log.old[to][2] = x.v[i];
    log.old[to][3] = x.g[i];
  }
}

// Bits of a block's elements: within bounds or inactive; not finite.
struct BlockAnswers {
  uint64_t selected, bad;
};

// Answers and, if there is a log, notes for a block of n elements whose first is element `at` of the
// tile.
ROSE_INLINE BlockAnswers answers_by_keys(const uint32_t* keys, const Elements& x, int at, int n,
                                         Bounds bounds, BracketLog* log) {
  // Bit i: lo <= keys[i] <= lo + span.
  const auto in_range = [&](uint32_t lo, uint32_t span) ROSE_ALWAYS_INLINE {
    uint64_t bits = 0;
    for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
      bits |= (uint64_t)lanes_in_range(keys + start, lanes, lo, span) << start;
    });
    return bits;
  };
  uint64_t selected = 0;
  for_each_16(n, [&](int start, int lanes) ROSE_ALWAYS_INLINE {
    selected |= (uint64_t)selected_of_16(keys + start, lanes, bounds) << start;
  });
  const uint64_t unranked = in_range(kInactiveKey, ~kInactiveKey);
  const uint64_t inactive = unranked ? in_range(kInactiveKey, 0) : 0;
  if (log) {
    uint64_t inside = 0;
    for (int t = 0; t < log->count; ++t) {
      const Bracket bracket = log->brackets[t];
      const uint32_t low = (uint32_t)bracket.low;
      const uint64_t pivots = bracket.pivot < 0 ? 0 : in_range((uint32_t)bracket.pivot, 0);
      log->below[t] += low > 0 ? __builtin_popcountll(in_range(0, low - 1)) : 0;
      log->at_pivot[t] += __builtin_popcountll(pivots);
      inside |= in_range(low, (uint32_t)bracket.high - low) & ~pivots;
    }
    log->inactive += __builtin_popcountll(inactive);
    log->nonfinite += __builtin_popcountll(unranked & ~inactive);
    for_each_set(inside,
                 [&](int i) ROSE_ALWAYS_INLINE { log_element(keys[i], x, at, i, bounds, *log); });
  }
  return {selected, unranked & ~inactive};
}

// Notes one element, by one bracket.
ROSE_INLINE void note_one(uint32_t key, const Elements& x, int at, int i, Bounds bounds,
                          BracketLog& log) {
  const int32_t k = (int32_t)key;
  const Bracket bracket = log.brackets[0];
  if (k < 0) {
    log.inactive += key == kInactiveKey;
    log.nonfinite += key != kInactiveKey;
  } else if (k < bracket.low) {
    ++log.below[0];
  } else if (k == bracket.pivot) {
    ++log.at_pivot[0];
  } else if (k <= bracket.high) {
    log_element(key, x, at, i, bounds, log);
  }
}

void adamw(float* __restrict p, float* __restrict m, float* __restrict v, const float* __restrict g,
           int n, const Update& update) {
  const Update u = update;
  for (int i = 0; i < n; ++i) adamw_element<false>(p[i], m[i], v[i], g[i], 3, u);
}

void decay(const float* __restrict m, float* __restrict v, int n, const Update& update) {
  const Update u = update;
  for (int i = 0; i < n; ++i) v[i] = second_moment(v[i], m[i], u);
}

ROSE_INLINE uint64_t not_finite(const float* m, const float* g, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t ag = abs_bits(g[i]), am = abs_bits(m[i]), larger = ag > am ? ag : am;
    largest = larger > largest ? larger : largest;
  }
  uint64_t bad = 0;
  if (largest < kInfinityBits) return bad;
  for (int i = 0; i < n; ++i) {
    bad |= (uint64_t)(abs_bits(g[i]) >= kInfinityBits || abs_bits(m[i]) >= kInfinityBits) << i;
  }
  return bad;
}

// The bits of a block as conditions; elements after the last whole vector have none.
struct BlockLanes {
  Condition of[kBlock / kLanes];

  uint64_t bits(int n) const {
    uint64_t all = 0;
    for (int i = 0; i + kLanes <= n; i += kLanes) all |= (uint64_t)bits_of(of[i / kLanes]) << i;
    return all;
  }
  // Of the vector that has element i.
  void set(uint64_t bits, int i) { of[i / kLanes] = condition((uint32_t)(bits >> (i - i % kLanes))); }
  void set_all(uint64_t bits, int n) {
    for (int i = 0; i + kLanes <= n; i += kLanes) of[i / kLanes] = condition((uint32_t)(bits >> i));
  }
};

// M = 1 where `lanes` have it, 0 elsewhere.
ROSE_INLINE void update_lanes(float* __restrict p, float* __restrict m, float* __restrict v,
                              const float* __restrict g, const BlockLanes& lanes, int n,
                              const Update& u) {
  for (int i = 0; i + kLanes <= n; i += kLanes) {
    const Condition on = lanes.of[i / kLanes];
    Lanes pp = load_lanes(p + i), mm = load_lanes(m + i), vv = load_lanes(v + i);
    moments_step(mm, vv, load_lanes(g + i), on, u);
    parameter_step(pp, mm, vv, on, all_lanes(u.step_size[3]), all_lanes(u.decay[3]), u);
    store_lanes(p + i, pp);
    store_lanes(m + i, mm);
    store_lanes(v + i, vv);
  }
}

// M by both: gamma where only `first` has it, 1 - gamma where only `second` has it.
ROSE_INLINE void update_lanes(float* __restrict p, float* __restrict m, float* __restrict v,
                              const float* __restrict g, const BlockLanes& first,
                              const BlockLanes& second, int n, const Update& u) {
  for (int i = 0; i + kLanes <= n; i += kLanes) {
    const Condition is_first = first.of[i / kLanes], is_second = second.of[i / kLanes];
    Lanes mm = load_lanes(m + i), vv = load_lanes(v + i), gg = load_lanes(g + i);
    // Where not both are set, `first` means gamma, or nothing is on.
    const Lanes x = choose(is_first, all_lanes(u.m[1]), all_lanes(u.m[2]));
    const Lanes c = choose(is_first, all_lanes(u.m[2]), all_lanes(u.m[1]));
    gg = choose(both(is_first, is_second), gg, add(mul(x, gg), mul(c, mm)));
    moments_step(mm, vv, gg, either(is_first, is_second), u);
    store_lanes(m + i, mm);
    store_lanes(v + i, vv);
  }
  for (int i = 0; i + kLanes <= n; i += kLanes) {
    const Condition is_first = first.of[i / kLanes], is_second = second.of[i / kLanes];
    const auto by_kind = [&](const float* table) ROSE_ALWAYS_INLINE {
      return choose(both(is_first, is_second), all_lanes(table[3]),
                    choose(is_first, all_lanes(table[1]), all_lanes(table[2])));
    };
    Lanes pp = load_lanes(p + i);
    parameter_step(pp, load_lanes(m + i), load_lanes(v + i), either(is_first, is_second),
                   by_kind(u.step_size), by_kind(u.decay), u);
    store_lanes(p + i, pp);
  }
}

// Bits of a block's elements: surely below; inactive and at the pivot, as far as that was looked for;
// others of no side surely, as are those after the last whole vector.
struct BlockSides {
  uint64_t below, inactive, at_pivot, unsure;

  uint64_t selected() const { return below | inactive | at_pivot; }
  // Keys of single elements cost more than those of a whole block.
  bool few_unsure() const { return __builtin_popcountll(unsure) <= kBlock / 16; }
};
constexpr BlockSides kAllUnsure = {0, 0, 0, ~(uint64_t)0};

// `lanes`, if there are any: those that are selected.
ROSE_INLINE BlockSides sides_of_block(const float* g, const float* m, float alpha, Sides sides, int n,
                                      BlockLanes* lanes) {
  uint64_t below = 0, sure = 0;
  for (int i = 0; i + kLanes <= n; i += kLanes) {
    const SidesOfLanes side = sides_of(load_lanes(g + i), load_lanes(m + i), alpha, sides);
    if (lanes) lanes->of[i / kLanes] = side.below;
    below |= (uint64_t)bits_of(side.below) << i;
    sure |= (uint64_t)bits_of(side.sure) << i;
  }
  BlockSides result = {below, 0, 0, lowest_bits(n) & ~sure};
  if (result.few_unsure()) return result;
  // Rare, but where there is one there are many: rows of zeros, and moments on their way to zero.
  const Lanes zero = all_lanes(0.0f), infinity = all_lanes(bits_float(kInfinityBits));
  const auto bits_where = [&](auto test) ROSE_ALWAYS_INLINE {
    uint64_t bits = 0;
    for (int i = 0; i + kLanes <= n; i += kLanes) {
      bits |= (uint64_t)bits_of(test(load_lanes(g + i), load_lanes(m + i))) << i;
    }
    return bits;
  };
  result.inactive = bits_where([&](Lanes g, Lanes m) ROSE_ALWAYS_INLINE {
    return both(at_most(magnitude(m), zero), less(magnitude(g), infinity));
  });
  result.unsure &= ~result.inactive;
  if (!result.few_unsure()) {
    const auto above = [&](Lanes g, Lanes m)
                           ROSE_ALWAYS_INLINE { return above_if_small(g, m, alpha, sides); };
    result.unsure &= ~bits_where(above);
  }
  if (!result.few_unsure() && (sides.ties_below || sides.ties_at_pivot || sides.ties_above)) {
    const auto tied = [&](Lanes g, Lanes m) ROSE_ALWAYS_INLINE {
      return both(at_most(magnitude(g), zero), less(magnitude(m), infinity));
    };
    const uint64_t ties = result.unsure & bits_where(tied);
    if (sides.ties_below) result.below |= ties;
    if (sides.ties_at_pivot) result.at_pivot = ties;
    result.unsure &= ~ties;
  }
  if (lanes) lanes->set_all(result.selected(), n);
  return result;
}

// First-order risks between two keys, of which all that are finite are sure, and those of zeros, which
// are inactive unless they are ranked.
ROSE_INLINE BlockSides sides_of_magnitudes(const float* g, bool rank_inactive, Bracket bracket, int n) {
  const Lanes low = all_lanes(bits_float((uint32_t)bracket.low));
  const Lanes high = all_lanes(bits_float((uint32_t)bracket.high));
  const Lanes infinity = all_lanes(bits_float(kInfinityBits)), zero = all_lanes(0.0f);
  uint64_t below = 0;
  BlockLanes zeros, sure;
  Condition any_zero = condition(0), all_sure = condition(kAllLanes);
  for (int i = 0; i + kLanes <= n; i += kLanes) {
    const Lanes a = magnitude(load_lanes(g + i));
    const Condition is_zero = at_most(a, zero), is_below = less(a, low);
    const Condition is_sure = either(is_below, both(less(high, a), less(a, infinity)));
    any_zero = either(any_zero, zeros.of[i / kLanes] = is_zero);
    all_sure = both(all_sure, sure.of[i / kLanes] = is_sure);
    below |= (uint64_t)bits_of(is_below) << i;
  }
  // Most blocks have no zero and none that is not sure: bits cost more than the comparisons.
  const uint64_t inactive = rank_inactive || bits_of(any_zero) == 0 ? 0 : zeros.bits(n);
  const uint64_t others = bits_of(all_sure) == kAllLanes ? lowest_bits(n - n % kLanes) : sure.bits(n);
  return {below & ~inactive, inactive, 0, lowest_bits(n) & ~(others | inactive)};
}

ROSE_INLINE void note_sides(const BlockSides& side, BracketLog& log) {
  log.below[0] += __builtin_popcountll(side.below);
  log.inactive += __builtin_popcountll(side.inactive);
  log.at_pivot[0] += __builtin_popcountll(side.at_pivot);
}

// Without a log, the threshold is known.
ROSE_INLINE Bracket bracket_of(const BracketLog* log, Bounds bounds) {
  return log ? log->brackets[0] : Bracket{bounds.high, bounds.high, bounds.high};
}

constexpr int kDense = 16;  // blocks that go by keys, after one in which sides settled too few

void pack(const Risk& risk, int n, Bounds bounds, uint8_t* __restrict bits, BracketLog* log) {
  const Bracket bracket = bracket_of(log, bounds);
  const Sides sides = sides_of_bracket(bracket);
  const bool by_sides = bounds.low < 0 && bracket.low >= 0 && !(risk.m && risk.rank_inactive);
  int dense = 0;
  for_each_block(n, [&](int at, int n) ROSE_ALWAYS_INLINE {
    prefetch_ahead(risk, at);
    uint64_t selected;
    BlockSides side = kAllUnsure;
    if (by_sides && dense == 0) {
      side = risk.m ? sides_of_block(risk.g + at, risk.m + at, risk.alpha, sides, n, nullptr)
                    : sides_of_magnitudes(risk.g + at, risk.rank_inactive, bracket, n);
    }
    if (side.few_unsure()) {
      if (log) note_sides(side, *log);
      selected = side.selected();
      for_each_set(side.unsure, [&](int i) ROSE_ALWAYS_INLINE {
        uint32_t key;
        block_keys(risk, at + i, 1, &key);
        selected |= (uint64_t)if_selected(key, bounds, 1) << i;
        if (log) note_one(key, {}, at, i, bounds, *log);
      });
    } else {
      dense = dense == 0 ? kDense : dense - 1;
      uint32_t keys[kBlock];
      block_keys(risk, at, n, keys);
      selected = answers_by_keys(keys, {}, at, n, bounds, log).selected;
    }
    __builtin_memcpy(bits + at / 8, &selected, (size_t)(n + 7) / 8);
  });
}

// `second_lanes`, where sides settled the block: those that are surely selected.
template <bool kFractional>
ROSE_INLINE void masked_block(float* p, float* m, float* v, const float* g, const Masks& masks,
                              const BlockSides& side, BlockLanes& second_lanes, int at, int n,
                              const Update& u, UpdateCounts& counts, BracketLog* log) {
  uint64_t first = masks.base & 1 ? lowest_bits(n) : 0, second = masks.base & 2 ? lowest_bits(n) : 0;
  if (masks.first_bits) first |= load_bits(masks.first_bits + at / 8, n);
  if (masks.second_bits) second |= load_bits(masks.second_bits + at / 8, n);
  uint64_t bad = 0;
  BlockLanes first_lanes;
  bool has_lanes = false;
  if (!masks.from_risk) {
    bad = not_finite(m, g, n);
    if (masks.base == 3 && bad == 0) {  // all of the tensor
      counts.updated += n;
      return adamw(p, m, v, g, n, u);
    }
  } else {
    has_lanes = side.few_unsure();
    if (has_lanes) {
      if (log) note_sides(side, *log);
      second = side.selected();
      for_each_set(side.unsure, [&](int i) ROSE_ALWAYS_INLINE {
        const uint32_t key = second_order_key(g[i], m[i], masks.alpha, false);
        second |= (uint64_t)if_selected(key, masks.bounds, 1) << i;
        bad |= (uint64_t)(key == kNonfiniteKey) << i;
        second_lanes.set(second, i);
        if (log) note_one(key, {p, m, v, g}, at, i, masks.bounds, *log);
      });
    } else {
      counts.dense = counts.dense == 0 ? kDense : counts.dense - 1;
      uint32_t keys[kBlock];
      block_keys({g, m, masks.alpha, masks.rank_inactive}, 0, n, keys);
      const BlockAnswers answers = answers_by_keys(keys, {p, m, v, g}, at, n, masks.bounds, log);
      second |= answers.selected;
      bad = answers.bad;
    }
  }
  first &= ~bad;
  second &= ~bad;
  const uint64_t any = first | second;
  counts.updated += __builtin_popcountll(any);
  counts.nonfinite += __builtin_popcountll(bad);
  if (!has_lanes) second_lanes.set_all(kFractional ? second : any, n);
  if (kFractional) {
    first_lanes.set_all(first, n);
    update_lanes(p, m, v, g, first_lanes, second_lanes, n, u);
  } else {
    update_lanes(p, m, v, g, second_lanes, n, u);
  }
  for (int i = n - n % kLanes; i < n; ++i) {
    const int kind = (int)(first >> i & 1) + 2 * (int)(second >> i & 1);
    adamw_element<kFractional>(p[i], m[i], v[i], g[i], kFractional || kind == 0 ? kind : 3, u);
  }
}

template <bool kFractional>
ROSE_INLINE void masked_blocks(float* p, float* m, float* v, const float* g, const Masks& masks, int n,
                               const Update& u, UpdateCounts& counts, BracketLog* log) {
  const Sides sides = sides_of_bracket(bracket_of(log, masks.bounds));
  const bool others =
      masks.second_bits || (kFractional ? masks.base & 2 : masks.base || masks.first_bits);
  const bool by_sides = masks.from_risk && !others && masks.bounds.low < 0 && !masks.rank_inactive;
  // Sides are found a block ahead. Where some are unsure, the branch that the CPU did not expect then
  // depends on what was read long ago, and does not hold up what is to be read next.
  struct {
    BlockSides side;
    BlockLanes second;
    const float* g;
    float scaled[kBlock];
  } blocks[2];
  const float factor = masks.factors[0], clip = masks.factors[1];
  const auto look = [&](int at, int n) ROSE_ALWAYS_INLINE {
    if (n <= 0) return;
    auto& block = blocks[at / kBlock % 2];
    block.g = g + at;
    if (factor != 1.0f || clip != 1.0f) {
      scale(g + at, factor, clip, n, block.scaled);
      block.g = block.scaled;
    }
    block.side = kAllUnsure;
    if (!by_sides || counts.dense != 0) return;
    for (int i = 0; i < kBlock; i += kLine) {
      __builtin_prefetch(p + at + i);
      __builtin_prefetch(v + at + i);
    }
    block.side = sides_of_block(block.g, m + at, masks.alpha, sides, n, &block.second);
  };
  look(0, n < kBlock ? n : kBlock);
  for_each_block(n, [&](int at, int length) ROSE_ALWAYS_INLINE {
    const int next = at + kBlock, left = n - next;
    if (left >= kBlock) {
      look(next, kBlock);  // inlined with this length
    } else {
      look(next, left);
    }
    auto& block = blocks[at / kBlock % 2];
    masked_block<kFractional>(p + at, m + at, v + at, block.g, masks, block.side, block.second, at,
                              length, u, counts, log);
  });
}

void masked_adamw(float* p, float* m, float* v, const float* g, const Masks& masks, int n,
                  const Update& update, UpdateCounts& counts, BracketLog* log) {
  const Update u = update;
  const Masks local = masks;
  if (masks.fractional) {
    masked_blocks<true>(p, m, v, g, local, n, u, counts, log);
  } else {
    masked_blocks<false>(p, m, v, g, local, n, u, counts, log);
  }
}

// Sixteen lanes in a fixed order, so that every instruction set and every thread count agrees.
double sum_of_squares(const float* __restrict x, int n) {
  // In the compiler's own vectors: it unrolls a loop over an array, and then computes one by one.
  typedef float Floats __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(32)));
  Doubles quarters[4] = {};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    __builtin_prefetch(x + i + kTile);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Floats narrow;
      __builtin_memcpy(&narrow, x + i + 4 * q, sizeof(narrow));
      const Doubles wide = __builtin_convertvector(narrow, Doubles);
      quarters[q] += wide * wide;
    }
  }
  double lanes[16];
  __builtin_memcpy(lanes, quarters, sizeof(lanes));
  for (int j = 0; i < n; ++i, ++j) lanes[j] += (double)x[i] * (double)x[i];
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

}  // namespace

extern const TileKernels ROSE_ISA;
const TileKernels ROSE_ISA = {
    ROSE_ISA_NAME, widen,  narrow,         narrow_stochastic, scale,          keys, histogram,
    scan,          filter, count_line,     logged_between,    logged_wrongly, pack, adamw,
    masked_adamw,  decay,  sum_of_squares,
};

}  // namespace cpu
}  // namespace rose
