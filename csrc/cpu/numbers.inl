// Numbers of any dtype as lanes, and the walk over a run.

template <Dtype kType>
struct Fixed {  // a dtype that is known as this is compiled
  constexpr operator Dtype() const { return kType; }
};
typedef Fixed<Dtype::kFloat32> Float32;
typedef Fixed<Dtype::kBFloat16> BFloat16;

// Where a vector's elements are: `offset` elements from data[k], and element `i` of the run.
struct At {
  char* data[4];
  int offset, i;
};

// Operands of a run, as bits.
constexpr unsigned kFirst = 1, kSecond = 2, kThird = 4, kFourth = 8;

constexpr int kAhead = 4096;  // bytes: what the CPU fetches by itself ends with the page

// body(at, lanes) for every vector of a run. The last may have fewer than kLanes elements: those are
// copied, with zeros behind them, and copied back.
template <typename Body>
ROSE_INLINE void for_each_vector(const Run& run, unsigned reads, unsigned writes, Body body) {
  At at = {{run.data[0], run.data[1], run.data[2], run.data[3]}, 0, 0};
  const int64_t items[4] = {run.item(0), run.item(1), run.item(2), run.item(3)};
  for (; at.i + kLanes <= run.n; at.offset = at.i += kLanes) {
    for (int k = 0; k < 4; ++k) {
      if (reads >> k & 1) __builtin_prefetch(at.data[k] + at.i * items[k] + kAhead);
    }
    body(at, kLanes);
  }
  const int left = run.n - at.i;
  if (left == 0) return;
  char copies[4][4 * kLanes] = {};
  for (int k = 0; k < 4; ++k) {
    if (!(reads >> k & 1)) continue;
    __builtin_memcpy(copies[k], run.data[k] + at.i * run.item(k), (size_t)(left * run.item(k)));
    at.data[k] = copies[k];
  }
  at.offset = 0;
  body(at, left);
  for (int k = 0; k < 4; ++k) {
    if (!(writes >> k & 1)) continue;
    __builtin_memcpy(run.data[k] + at.i * run.item(k), copies[k], (size_t)(left * run.item(k)));
  }
}

// In the order of half_to_float() and its kin in element.h, whose comments say why.
ROSE_INLINE Lanes half_to_lanes(Words h) {
  const Words size = h & words<0x7FFF>();
  const Words finite = as_words(as_lanes(left<13>(size)) * 0x1p112f);
  const Words special = left<13>(size) | words<kInfinityBits>();
  const Words sign = left<16>(h & words<0x8000>());
  return as_lanes(sign | choose(at_most(size, words<0x7BFF>()), finite, special));
}

ROSE_INLINE Words lanes_to_half(Lanes x) {
  const Words u = absolute(as_words(x)), sign = right<16>(as_words(x)) & words<0x8000>();
  const Words odd = right<13>(u) & words<1>();
  const Words normal = right<13>(u - words<((127 - 15) << 23)>() + words<0xFFF>() + odd);
  const Words denormal = as_words(as_lanes(u) + 0.5f) - words<0x3F000000>();
  const Words special = choose(at_most(u, words<kInfinityBits>()), words<0x7C00>(), words<0x7E00>());
  const Words finite = choose(at_most(u, words<0x387FFFFF>()), denormal, normal);
  return sign | choose(at_most(u, words<0x477FEFFF>()), finite, special);
}

// In the upper halves of words.
ROSE_INLINE Words lanes_to_bf16(Lanes x) {
  const Words u = as_words(x);
  const Words rounded = u + words<0x7FFF>() + (right<16>(u) & words<1>());
  return choose(is_nan(x), words<0x7FC00000>(), rounded);
}

ROSE_INLINE Words lanes_to_bf16_stochastic(Lanes x, Words random) {
  const Words u = as_words(x);
  return choose(is_nan(x), u | words<0x400000>(), u + random);
}

ROSE_INLINE Words mix(Words x) {
  x = (x ^ right<16>(x)) * words<0x21F0AAADu>();
  x = (x ^ right<15>(x)) * words<0xD35A2D97u>();
  return x ^ right<15>(x);
}

// rounding_bits() of one vector after the other. Two neighbours share a word, whose lower half comes
// first in memory, so that a vector of words serves two vectors, unless neighbours are in different
// ones.
class RandomBits {
 public:
  ROSE_MEMBER RandomBits(const Step& step, Rounded what)
      : splits_((step.random_index & 1) != 0),
        first_(step.random_index & ~1u),
        next_(all_words(first_ | (uint32_t)what) + left<1>(words_from(0))),
        keys_{all_words(step.random_keys[0]), all_words(step.random_keys[1])} {}

  ROSE_MEMBER Words next() {
    if (turn_ == 0) {
      store_words(words_, draw());
      if (splits_) store_words(words_ + kLanes, draw());
    }
    const Words bits = load_halves((const uint16_t*)words_ + turn_ * kLanes + splits_);
    turn_ = 1 - turn_;
    if (splits_ && turn_ == 0) next_ = next_ - words<2 * kLanes>();
    return bits;
  }

 private:
  ROSE_MEMBER Words draw() {
    Words key = keys_[0];
    if (first_ > ~(uint32_t)(2 * kRun)) {  // a carry out of the lower half of indices may come
      key = choose(at_most(all_words(first_), next_), key, keys_[1]);
    }
    const Words drawn = mix(next_ ^ key);
    next_ = next_ + words<2 * kLanes>();
    return drawn;
  }

  bool splits_;
  int turn_ = 0;
  uint32_t first_, words_[2 * kLanes];
  Words next_, keys_[2];
};

template <typename D>
ROSE_INLINE Lanes load(D dtype, const At& at, int k) {
  if (dtype == Dtype::kFloat32) return load_lanes((const float*)at.data[k] + at.offset);
  const uint16_t* const halves = (const uint16_t*)at.data[k] + at.offset;
  if (dtype == Dtype::kBFloat16) return as_lanes(load_upper_halves(halves));
  return half_to_lanes(load_halves(halves));
}

template <typename D>
ROSE_INLINE void store(D dtype, const At& at, int k, Lanes a) {
  if (dtype == Dtype::kFloat32) return store_lanes((float*)at.data[k] + at.offset, a);
  uint16_t* const halves = (uint16_t*)at.data[k] + at.offset;
  if (dtype == Dtype::kBFloat16) return store_upper_halves(halves, lanes_to_bf16(a));
  store_halves(halves, lanes_to_half(a));
}

// Bfloat16 stochastically, others to nearest.
template <typename D>
ROSE_INLINE void store_rounded(D dtype, const At& at, int k, Lanes a, RandomBits& random) {
  if (dtype != Dtype::kBFloat16) return store(dtype, at, k, a);
  const Words rounded = lanes_to_bf16_stochastic(a, random.next());
  store_upper_halves((uint16_t*)at.data[k] + at.offset, rounded);
}

// Whether that changes anything.
ROSE_INLINE bool scales(const Run& run) { return run.factors[0] != 1.0f || run.factors[1] != 1.0f; }

// Unscaled, then clipped, if it `scales`.
template <typename D>
ROSE_INLINE Lanes load_gradient(D dtype, const At& at, int k, const Run& run, bool scales) {
  const Lanes g = load(dtype, at, k);
  return !scales ? g : mul(mul(g, run.factors[0]), run.factors[1]);
}

// Sixteen sums in a fixed order, so that every set of instructions and every number of threads agrees.
template <typename D>
ROSE_INLINE double sum_of_squares_of(D dtype, const char* x, int n, float factor) {
  // In the compiler's own vectors: it unrolls a loop over an array, and then computes one by one.
  typedef float Floats __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(32)));
  Doubles quarters[4] = {};
  const int item = dtype == Dtype::kFloat32 ? 4 : 2;
  const auto add_16 = [&](const At& at) ROSE_ALWAYS_INLINE {
    float values[16];
    __builtin_prefetch(at.data[0] + at.offset * item + kAhead);
    const float* from = (const float*)at.data[0] + at.offset;
    if (dtype != Dtype::kFloat32) {
      for (int j = 0; j < 16; j += kLanes) {
        store_lanes(values + j, load(dtype, {{at.data[0]}, at.offset + j, 0}, 0));
      }
      from = values;
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Floats narrow;
      __builtin_memcpy(&narrow, from + 4 * q, sizeof(narrow));
#if ROSE_VECTOR_BITS >= 256  // the compiler's own conversion takes five instructions
      const Doubles wide = (Doubles)_mm256_cvtps_pd((__m128)(narrow * factor));
#else
      const Doubles wide = __builtin_convertvector(narrow * factor, Doubles);
#endif
      quarters[q] += wide * wide;
    }
  };
  int i = 0;
  for (; i + 16 <= n; i += 16) add_16({{(char*)x}, i, 0});
  if (i < n) {
    char rest[64] = {};
    __builtin_memcpy(rest, x + i * item, (size_t)((n - i) * item));
    add_16({{rest}, 0, 0});
  }
  double lanes[16];
  __builtin_memcpy(lanes, quarters, sizeof(lanes));
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

double sum_of_squares(const char* x, Dtype dtype, int n, float factor) {
  if (dtype == Dtype::kFloat32) return sum_of_squares_of(Float32(), x, n, factor);
  return sum_of_squares_of(dtype, x, n, factor);
}
