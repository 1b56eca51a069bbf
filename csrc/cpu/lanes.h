// Several elements at once: floats, words, and conditions on them, for the instruction set that
// ROSE_VECTOR_BITS names (0: the compiler's own vectors, of any machine). Included by loops.inl, inside
// its namespace.

#if ROSE_VECTOR_BITS == 512

constexpr int kLanes = 16;
struct Lanes {
  __m512 x;
};
struct Words {
  __m512i x;
};
struct Condition {
  __mmask16 x;
};

ROSE_INLINE Lanes load_lanes(const float* from) { return {_mm512_loadu_ps(from)}; }
ROSE_INLINE void store_lanes(float* to, Lanes a) { _mm512_storeu_ps(to, a.x); }
ROSE_INLINE Lanes all_lanes(float a) { return {_mm512_set1_ps(a)}; }
ROSE_INLINE Lanes root(Lanes a) { return {_mm512_sqrt_ps(a.x)}; }
// Not where a lane is NaN.
ROSE_INLINE Condition at_most(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LE_OQ)}; }
ROSE_INLINE Condition less(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ)}; }
// Where a condition holds already.
ROSE_INLINE Condition at_most(Condition c, Lanes a, Lanes b) {
  return {_mm512_mask_cmp_ps_mask(c.x, a.x, b.x, _CMP_LE_OQ)};
}
ROSE_INLINE Condition less(Condition c, Lanes a, Lanes b) {
  return {_mm512_mask_cmp_ps_mask(c.x, a.x, b.x, _CMP_LT_OQ)};
}
ROSE_INLINE Condition is_nan(Lanes a) { return {_mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q)}; }
ROSE_INLINE Lanes choose(Condition c, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps(c.x, b.x, a.x)};
}

ROSE_INLINE Words load_words(const uint32_t* from) { return {_mm512_loadu_si512(from)}; }
ROSE_INLINE void store_words(uint32_t* to, Words a) { _mm512_storeu_si512(to, a.x); }
ROSE_INLINE Words all_words(uint32_t a) { return {_mm512_set1_epi32((int)a)}; }
// A constant, from memory: in loops, compilers move it to a register by two instructions each time.
template <uint32_t kWord>
ROSE_INLINE Words words() {
  static const uint32_t word = kWord;
  __m512i x;
  asm("vpbroadcastd %1, %0" : "=v"(x) : "m"(word));
  return {x};
}
ROSE_INLINE Words as_words(Lanes a) { return {_mm512_castps_si512(a.x)}; }
ROSE_INLINE Lanes as_lanes(Words a) { return {_mm512_castsi512_ps(a.x)}; }
ROSE_INLINE Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.x, b.x)}; }
ROSE_INLINE Words operator-(Words a, Words b) { return {_mm512_sub_epi32(a.x, b.x)}; }
ROSE_INLINE Words operator*(Words a, Words b) { return {_mm512_mullo_epi32(a.x, b.x)}; }
ROSE_INLINE Words operator&(Words a, Words b) { return {_mm512_and_si512(a.x, b.x)}; }
ROSE_INLINE Words operator|(Words a, Words b) { return {_mm512_or_si512(a.x, b.x)}; }
ROSE_INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.x, b.x)}; }
template <int kBits>
ROSE_INLINE Words left(Words a) {
  return {_mm512_slli_epi32(a.x, kBits)};
}
template <int kBits>
ROSE_INLINE Words right(Words a) {
  return {_mm512_srli_epi32(a.x, kBits)};
}
ROSE_INLINE Condition equal(Words a, Words b) { return {_mm512_cmpeq_epi32_mask(a.x, b.x)}; }
ROSE_INLINE Condition at_most(Words a, Words b) { return {_mm512_cmple_epu32_mask(a.x, b.x)}; }
ROSE_INLINE Condition at_most_signed(Words a, Words b) { return {_mm512_cmple_epi32_mask(a.x, b.x)}; }
ROSE_INLINE Words choose(Condition c, Words a, Words b) {
  return {_mm512_mask_blend_epi32(c.x, b.x, a.x)};
}

ROSE_INLINE Condition condition(uint32_t bits) { return {(__mmask16)bits}; }
ROSE_INLINE uint32_t bits_of(Condition c) { return c.x; }
ROSE_INLINE Condition both(Condition a, Condition b) { return {(__mmask16)(a.x & b.x)}; }
ROSE_INLINE Condition either(Condition a, Condition b) { return {(__mmask16)(a.x | b.x)}; }
ROSE_INLINE Condition except(Condition a, Condition b) { return {(__mmask16)(a.x & ~b.x)}; }

// Sixteen bits of each word, from and to contiguous memory.
ROSE_INLINE Words load_halves(const uint16_t* from) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from))};
}
ROSE_INLINE void store_halves(uint16_t* to, Words a) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(a.x));
}

// Appends the words whose condition holds; `to` has room for kLanes. Compressed in a register: the form
// that stores to memory is microcoded on some CPUs.
ROSE_INLINE void append(uint32_t* to, Condition c, Words a) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(c.x, a.x));
}

#elif ROSE_VECTOR_BITS == 256

constexpr int kLanes = 8;
struct Lanes {
  __m256 x;
};
struct Words {
  __m256i x;
};
struct Condition {
  __m256 x;
};

ROSE_INLINE Lanes load_lanes(const float* from) { return {_mm256_loadu_ps(from)}; }
ROSE_INLINE void store_lanes(float* to, Lanes a) { _mm256_storeu_ps(to, a.x); }
ROSE_INLINE Lanes all_lanes(float a) { return {_mm256_set1_ps(a)}; }
ROSE_INLINE Lanes root(Lanes a) { return {_mm256_sqrt_ps(a.x)}; }
ROSE_INLINE Condition at_most(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_LE_OQ)}; }
ROSE_INLINE Condition less(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ)}; }
ROSE_INLINE Condition is_nan(Lanes a) { return {_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q)}; }
ROSE_INLINE Lanes choose(Condition c, Lanes a, Lanes b) { return {_mm256_blendv_ps(b.x, a.x, c.x)}; }

ROSE_INLINE Words load_words(const uint32_t* from) {
  return {_mm256_loadu_si256((const __m256i*)from)};
}
ROSE_INLINE void store_words(uint32_t* to, Words a) { _mm256_storeu_si256((__m256i*)to, a.x); }
ROSE_INLINE Words all_words(uint32_t a) { return {_mm256_set1_epi32((int)a)}; }
ROSE_INLINE Words as_words(Lanes a) { return {_mm256_castps_si256(a.x)}; }
ROSE_INLINE Lanes as_lanes(Words a) { return {_mm256_castsi256_ps(a.x)}; }
ROSE_INLINE Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.x, b.x)}; }
ROSE_INLINE Words operator-(Words a, Words b) { return {_mm256_sub_epi32(a.x, b.x)}; }
ROSE_INLINE Words operator*(Words a, Words b) { return {_mm256_mullo_epi32(a.x, b.x)}; }
ROSE_INLINE Words operator&(Words a, Words b) { return {_mm256_and_si256(a.x, b.x)}; }
ROSE_INLINE Words operator|(Words a, Words b) { return {_mm256_or_si256(a.x, b.x)}; }
ROSE_INLINE Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.x, b.x)}; }
template <int kBits>
ROSE_INLINE Words left(Words a) {
  return {_mm256_slli_epi32(a.x, kBits)};
}
template <int kBits>
ROSE_INLINE Words right(Words a) {
  return {_mm256_srli_epi32(a.x, kBits)};
}
ROSE_INLINE Condition of_words(__m256i all_or_none) { return {_mm256_castsi256_ps(all_or_none)}; }
ROSE_INLINE Condition equal(Words a, Words b) { return of_words(_mm256_cmpeq_epi32(a.x, b.x)); }
ROSE_INLINE Condition at_most(Words a, Words b) {
  return of_words(_mm256_cmpeq_epi32(_mm256_min_epu32(a.x, b.x), a.x));
}
ROSE_INLINE Condition at_most_signed(Words a, Words b) {
  return of_words(_mm256_cmpeq_epi32(_mm256_min_epi32(a.x, b.x), a.x));
}
ROSE_INLINE Words choose(Condition c, Words a, Words b) {
  return {
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(b.x), _mm256_castsi256_ps(a.x), c.x))};
}

ROSE_INLINE Condition condition(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return of_words(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane));
}
ROSE_INLINE uint32_t bits_of(Condition c) { return (uint32_t)_mm256_movemask_ps(c.x); }
ROSE_INLINE Condition both(Condition a, Condition b) { return {_mm256_and_ps(a.x, b.x)}; }
ROSE_INLINE Condition either(Condition a, Condition b) { return {_mm256_or_ps(a.x, b.x)}; }
ROSE_INLINE Condition except(Condition a, Condition b) { return {_mm256_andnot_ps(b.x, a.x)}; }

ROSE_INLINE Words load_halves(const uint16_t* from) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from))};
}
ROSE_INLINE void store_halves(uint16_t* to, Words a) {  // of words below 2^16
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.x, a.x), 0x08);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
}

#else

constexpr int kLanes = 4;
typedef float Floats4 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef int32_t Signs4 __attribute__((vector_size(16)));
typedef uint16_t Halves4 __attribute__((vector_size(8)));
struct Lanes {
  Floats4 x;
};
struct Words {
  Words4 x;
};
struct Condition {
  Signs4 x;  // all bits, or none
};

template <typename To, typename From>
ROSE_INLINE To read(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof to);
  return to;
}

ROSE_INLINE Lanes load_lanes(const float* from) { return {read<Floats4>(from)}; }
ROSE_INLINE void store_lanes(float* to, Lanes a) { __builtin_memcpy(to, &a.x, sizeof a.x); }
ROSE_INLINE Lanes all_lanes(float a) { return {Floats4{a, a, a, a}}; }
ROSE_INLINE Lanes root(Lanes a) {
  Floats4 roots;
  for (int i = 0; i < kLanes; ++i) roots[i] = __builtin_sqrtf(a.x[i]);
  return {roots};
}
ROSE_INLINE Condition at_most(Lanes a, Lanes b) { return {a.x <= b.x}; }
ROSE_INLINE Condition less(Lanes a, Lanes b) { return {a.x < b.x}; }
ROSE_INLINE Condition is_nan(Lanes a) { return {a.x != a.x}; }

ROSE_INLINE Words load_words(const uint32_t* from) { return {read<Words4>(from)}; }
ROSE_INLINE void store_words(uint32_t* to, Words a) { __builtin_memcpy(to, &a.x, sizeof a.x); }
ROSE_INLINE Words all_words(uint32_t a) { return {Words4{a, a, a, a}}; }
ROSE_INLINE Words as_words(Lanes a) { return {(Words4)a.x}; }
ROSE_INLINE Lanes as_lanes(Words a) { return {(Floats4)a.x}; }
ROSE_INLINE Words operator+(Words a, Words b) { return {a.x + b.x}; }
ROSE_INLINE Words operator-(Words a, Words b) { return {a.x - b.x}; }
ROSE_INLINE Words operator*(Words a, Words b) { return {a.x * b.x}; }
ROSE_INLINE Words operator&(Words a, Words b) { return {a.x & b.x}; }
ROSE_INLINE Words operator|(Words a, Words b) { return {a.x | b.x}; }
ROSE_INLINE Words operator^(Words a, Words b) { return {a.x ^ b.x}; }
template <int kBits>
ROSE_INLINE Words left(Words a) {
  return {a.x << kBits};
}
template <int kBits>
ROSE_INLINE Words right(Words a) {
  return {a.x >> kBits};
}
ROSE_INLINE Condition equal(Words a, Words b) { return {a.x == b.x}; }
ROSE_INLINE Condition at_most(Words a, Words b) { return {a.x <= b.x}; }
ROSE_INLINE Condition at_most_signed(Words a, Words b) { return {(Signs4)a.x <= (Signs4)b.x}; }
ROSE_INLINE Words choose(Condition c, Words a, Words b) {
  const Words4 mask = (Words4)c.x;
  return {(a.x & mask) | (b.x & ~mask)};
}
ROSE_INLINE Lanes choose(Condition c, Lanes a, Lanes b) {
  return as_lanes(choose(c, as_words(a), as_words(b)));
}

ROSE_INLINE Condition condition(uint32_t bits) {
  const Words4 lane = {1, 2, 4, 8};
  return {(Words4{bits, bits, bits, bits} & lane) == lane};
}
ROSE_INLINE uint32_t bits_of(Condition c) {
  const Words4 own = (Words4)c.x & Words4{1, 2, 4, 8};
  return own[0] | own[1] | own[2] | own[3];
}
ROSE_INLINE Condition both(Condition a, Condition b) { return {a.x & b.x}; }
ROSE_INLINE Condition either(Condition a, Condition b) { return {a.x | b.x}; }
ROSE_INLINE Condition except(Condition a, Condition b) { return {a.x & ~b.x}; }

ROSE_INLINE Words load_halves(const uint16_t* from) {
  return {__builtin_convertvector(read<Halves4>(from), Words4)};
}
ROSE_INLINE void store_halves(uint16_t* to, Words a) {
  const Halves4 halves = __builtin_convertvector(a.x, Halves4);
  __builtin_memcpy(to, &halves, sizeof halves);
}

#endif

#if ROSE_VECTOR_BITS != 512
ROSE_INLINE void append(uint32_t* to, Condition c, Words a) {
  uint32_t words[kLanes];
  store_words(words, a);
  for (uint32_t bits = bits_of(c); bits != 0; bits &= bits - 1) *to++ = words[__builtin_ctz(bits)];
}
#endif

// --------------------------------------------------------------------------- what all of them share

#if ROSE_VECTOR_BITS != 512
ROSE_INLINE Condition at_most(Condition c, Lanes a, Lanes b) { return both(c, at_most(a, b)); }
ROSE_INLINE Condition less(Condition c, Lanes a, Lanes b) { return both(c, less(a, b)); }
template <uint32_t kWord>
ROSE_INLINE Words words() {
  return all_words(kWord);
}
#endif

ROSE_INLINE Lanes operator*(Lanes a, Lanes b) { return {a.x * b.x}; }
ROSE_INLINE Lanes operator+(Lanes a, Lanes b) { return {a.x + b.x}; }
ROSE_INLINE Lanes operator-(Lanes a, Lanes b) { return {a.x - b.x}; }
ROSE_INLINE Lanes operator/(Lanes a, Lanes b) { return {a.x / b.x}; }
ROSE_INLINE Lanes operator*(float a, Lanes b) { return all_lanes(a) * b; }
ROSE_INLINE Lanes operator*(Lanes a, float b) { return a * all_lanes(b); }
ROSE_INLINE Lanes operator+(Lanes a, float b) { return a + all_lanes(b); }

ROSE_INLINE Words absolute(Words a) { return a & words<0x7FFFFFFFu>(); }
ROSE_INLINE Lanes magnitude(Lanes a) { return as_lanes(absolute(as_words(a))); }
ROSE_INLINE void append(float* to, Condition c, Lanes a) { append((uint32_t*)to, c, as_words(a)); }
ROSE_INLINE int count(Condition c) { return __builtin_popcount(bits_of(c)); }
ROSE_INLINE bool any(Condition c) { return bits_of(c) != 0; }
// Whether one or the other holds in each of the first n lanes.
ROSE_INLINE bool cover(Condition a, Condition b, int n) {
#if ROSE_VECTOR_BITS == 512
  if (n == kLanes) return _mm512_kortestc(a.x, b.x);
#endif
  const uint32_t all = (1u << n) - 1;
  return (bits_of(either(a, b)) & all) == all;
}
ROSE_INLINE Condition first_lanes(int n) { return condition(n < kLanes ? (1u << n) - 1 : 0xFFFFu); }
// From `first` up, in steps of one.
ROSE_INLINE Words words_from(uint32_t first) {
  static const uint32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_words(numbers) + all_words(first);
}
// lo <= a <= lo + span.
ROSE_INLINE Condition in_range(Words a, uint32_t lo, uint32_t span) {
  return at_most(a - all_words(lo), all_words(span));
}

// kLanes bits of a captured mask, from element i on, which kLanes divides; `n`: of how many elements.
ROSE_INLINE Condition load_bits(const uint8_t* bytes, int i, int n) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, bytes + i / 8, n == kLanes && kLanes >= 8 ? kLanes / 8 : (size_t)(n + 7) / 8);
  return condition(kLanes < 8 ? bits >> i % 8 : bits);
}
ROSE_INLINE void store_bits(uint8_t* bytes, int i, int n, uint32_t bits) {
  if (kLanes < 8) {
    bytes[i / 8] = (uint8_t)(i % 8 == 0 ? bits : bytes[i / 8] | bits << i % 8);
  } else {
    __builtin_memcpy(bytes + i / 8, &bits, n == kLanes ? kLanes / 8 : (size_t)(n + 7) / 8);
  }
}
