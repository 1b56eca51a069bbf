// Several elements at once: floats, words, and conditions on them, for the instruction set that
// ROSE_VECTOR_BITS names (0: any). Included by loops.inl, inside its namespace. (Intrinsics for
// AVX-512, whose masks compilers do not find in vector code; the compiler's own vectors for all others.
// A library for this, such as Highway, would be one more thing to install, and about as many lines.)

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

// The lower sixteen bits of each word, from and to contiguous memory.
ROSE_INLINE Words load_halves(const uint16_t* from) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from))};
}
ROSE_INLINE void store_halves(uint16_t* to, Words a) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(a.x));
}
// The upper ones; those of the loaded words are zeros below. One instruction each, not two or three.
ROSE_INLINE __m512i spread_halves() {
  static const uint16_t from[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                    0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return _mm512_loadu_si512(from);
}
ROSE_INLINE __m512i gather_upper_halves() {
  static const uint16_t from[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                    0, 0, 0, 0, 0, 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0};
  return _mm512_loadu_si512(from);
}
ROSE_INLINE Words load_upper_halves(const uint16_t* from) {
  const __m512i lower = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
  return {_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, spread_halves(), lower)};
}
ROSE_INLINE void store_upper_halves(uint16_t* to, Words a) {
  const __m512i upper = _mm512_permutexvar_epi16(gather_upper_halves(), a.x);
  _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(upper));
}

// Appends the words whose condition holds; `to` has room for kLanes. Compressed in a register: the form
// that stores to memory is microcoded on some CPUs.
ROSE_INLINE void append(uint32_t* to, Condition c, Words a) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(c.x, a.x));
}

#else  // The compiler's own vectors, of 8 lanes with AVX2 and of 4 elsewhere.

constexpr int kLanes = ROSE_VECTOR_BITS == 256 ? 8 : 4;
typedef float FloatVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordVector __attribute__((vector_size(4 * kLanes)));
typedef int32_t SignedVector __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * kLanes)));
struct Lanes {
  FloatVector x;
};
struct Words {
  WordVector x;
};
struct Condition {
  SignedVector x;  // all bits, or none
};

template <typename To, typename From>
ROSE_INLINE To read(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof to);
  return to;
}

ROSE_INLINE Lanes load_lanes(const float* from) { return {read<FloatVector>(from)}; }
ROSE_INLINE void store_lanes(float* to, Lanes a) { __builtin_memcpy(to, &a.x, sizeof a.x); }
ROSE_INLINE Lanes all_lanes(float a) { return {a - FloatVector{}}; }  // -0.0 stays
ROSE_INLINE Lanes root(Lanes a) {
#if ROSE_VECTOR_BITS == 256
  return {__builtin_ia32_sqrtps256(a.x)};
#elif defined(__x86_64__)
  return {__builtin_ia32_sqrtps(a.x)};
#else
  FloatVector roots;
  for (int i = 0; i < kLanes; ++i) roots[i] = __builtin_sqrtf(a.x[i]);
  return {roots};
#endif
}
// Not where a lane is NaN.
ROSE_INLINE Condition at_most(Lanes a, Lanes b) { return {a.x <= b.x}; }
ROSE_INLINE Condition less(Lanes a, Lanes b) { return {a.x < b.x}; }
ROSE_INLINE Condition is_nan(Lanes a) { return {a.x != a.x}; }

ROSE_INLINE Words load_words(const uint32_t* from) { return {read<WordVector>(from)}; }
ROSE_INLINE void store_words(uint32_t* to, Words a) { __builtin_memcpy(to, &a.x, sizeof a.x); }
ROSE_INLINE Words all_words(uint32_t a) { return {a - WordVector{}}; }
ROSE_INLINE Words as_words(Lanes a) { return {(WordVector)a.x}; }
ROSE_INLINE Lanes as_lanes(Words a) { return {(FloatVector)a.x}; }
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
ROSE_INLINE Condition at_most_signed(Words a, Words b) {
  return {(SignedVector)a.x <= (SignedVector)b.x};
}
ROSE_INLINE Lanes choose(Condition c, Lanes a, Lanes b) {
#if ROSE_VECTOR_BITS == 256
  return {__builtin_ia32_blendvps256(b.x, a.x, (FloatVector)c.x)};
#else
  return as_lanes(Words{(as_words(a).x & (WordVector)c.x) | (as_words(b).x & ~(WordVector)c.x)});
#endif
}
ROSE_INLINE Words choose(Condition c, Words a, Words b) {
  return as_words(choose(c, as_lanes(a), as_lanes(b)));
}

// Lane i is bit i.
ROSE_INLINE WordVector bit_of_lane() {
  static const uint32_t bits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  return read<WordVector>(bits);
}
ROSE_INLINE Condition condition(uint32_t bits) {
  return {(all_words(bits).x & bit_of_lane()) == bit_of_lane()};
}
ROSE_INLINE uint32_t bits_of(Condition c) {
#if ROSE_VECTOR_BITS == 256
  return (uint32_t)__builtin_ia32_movmskps256((FloatVector)c.x);
#elif defined(__x86_64__)
  return (uint32_t)__builtin_ia32_movmskps((FloatVector)c.x);
#else
  const WordVector own = (WordVector)c.x & bit_of_lane();
  return own[0] | own[1] | own[2] | own[3];
#endif
}
ROSE_INLINE Condition both(Condition a, Condition b) { return {a.x & b.x}; }
ROSE_INLINE Condition either(Condition a, Condition b) { return {a.x | b.x}; }
ROSE_INLINE Condition except(Condition a, Condition b) { return {a.x & ~b.x}; }

ROSE_INLINE Words load_halves(const uint16_t* from) {
  return {__builtin_convertvector(read<HalfVector>(from), WordVector)};
}
ROSE_INLINE void store_halves(uint16_t* to, Words a) {
  const HalfVector halves = __builtin_convertvector(a.x, HalfVector);
  __builtin_memcpy(to, &halves, sizeof halves);
}

ROSE_INLINE void append(uint32_t* to, Condition c, Words a) {
  uint32_t words[kLanes];
  store_words(words, a);
  for (uint32_t bits = bits_of(c); bits != 0; bits &= bits - 1) *to++ = words[__builtin_ctz(bits)];
}
ROSE_INLINE Words load_upper_halves(const uint16_t* from) { return left<16>(load_halves(from)); }
ROSE_INLINE void store_upper_halves(uint16_t* to, Words a) { store_halves(to, right<16>(a)); }
ROSE_INLINE Condition at_most(Condition c, Lanes a, Lanes b) { return both(c, at_most(a, b)); }
ROSE_INLINE Condition less(Condition c, Lanes a, Lanes b) { return both(c, less(a, b)); }
template <uint32_t kWord>
ROSE_INLINE Words words() {
  return all_words(kWord);
}

#endif

// --------------------------------------------------------------------------- what all of them share

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
