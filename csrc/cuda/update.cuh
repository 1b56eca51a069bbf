// The masked AdamW, by masks, by thresholds that are known, or by a ranking found on the way.
#pragma once

#include "capture.cuh"

namespace rose {
namespace cuda {

ROSE_DEVICE bool is_set(const float* found_inf) { return found_inf != nullptr && *found_inf != 0; }

// Counts up the step of segment i, and computes what all its elements have in common. By one thread.
ROSE_DEVICE void prepare(const UpdateArguments& a, int i) {
  const Segment& segment = a.table.segments[i];
  const float step = next_step(*segment.step);
  *segment.step = step;
  Prepared& prepared = a.prepared[i];
  const double lr = a.lrs == nullptr ? a.few_lrs[segment.group] : a.lrs[segment.group];
  prepared.update = make_update(a.table.groups[segment.group], lr, step, a.gamma);
  prepared.scale = mul(segment.sign, scalar_or_one(a.inv_scale));
  prepared.clip = a.clip == nullptr ? 1.0f : a.clip[segment.selective ? 0 : 1];
  prepared.random_key = random_key(a.seed, step_word(step));
  prepared.base_weight = segment.selective ? 0 : 3;
  bool has_bits = false;
  for (int k = 0; k < 2; ++k) {
    const MaskKind kind = segment.mask_kinds[k];
    has_bits = has_bits || kind == MaskKind::kBits;
    if (kind == MaskKind::kAll || (kind == MaskKind::kWhole && *segment.masks[k] != 0)) {
      prepared.base_weight += k == 0 ? a.weights.first : a.weights.second;
    }
  }
  prepared.ruled_out = prepared.base_weight == 0 && !has_bits && a.known == nullptr;
}

static __global__ void __launch_bounds__(kThreads) prepare_kernel(UpdateArguments a) {
  const int i = (int)(blockIdx.x * kThreads + threadIdx.x);
  const bool is_finite = !is_set(a.found_inf);
  if (i == 0) {
    a.counts[0] = a.counts[1] = 0;
    copy_record(is_finite ? a.known : nullptr, a.record);
  }
  if (i < a.table.count && is_finite) prepare(a, i);
}

// What the elements of a segment need, in shared memory: registers are for the elements, and what is
// read from global memory would have to be read again after every store.
struct Updated {
  const Dim* dims;  // of all segments
  const Segment* segment;
  Update update;
  float scale, clip, factor;  // of gradients: two, or their product where that is the same
  bool has_one_factor, has_one_threshold;
  Judge<true> judge;
  uint32_t random_key;
  int base_weight;
  int64_t offset;
  bool stochastic;  // rounding of bfloat16 parameters
  bool ruled_out;
  const uint8_t* bits[2];  // of masks; or null

  template <typename Notes>
  ROSE_METHOD void fill(const UpdateArguments& a, int index, const Notes& notes) {
    const Prepared& prepared = a.prepared[index];
    dims = a.table.dims;
    segment = &a.table.segments[index];
    update = prepared.update;
    scale = prepared.scale;
    clip = prepared.clip;
    factor = mul(scale, clip);
    has_one_factor = is_one_factor({scale, clip});
    has_one_threshold = notes.has_one_threshold();
    judge = notes.template judge<true>(segment->alpha, a.rank_inactive);
    random_key = prepared.random_key;
    base_weight = prepared.base_weight;
    offset = segment->offset;
    stochastic = a.stochastic;
    ruled_out = prepared.ruled_out;
    for (int k = 0; k < 2; ++k) {
      bits[k] = segment->mask_kinds[k] == MaskKind::kBits ? segment->masks[k] : nullptr;
    }
  }

  // The bits of mask k (0: first, 1: second order) for the elements from i on; that of i is the lowest.
  ROSE_METHOD unsigned mask_bits(int k, int64_t i) const {
    return bits[k] == nullptr ? 0u : (unsigned)read<uint8_t>(bits[k], i / 8) >> (i % 8);
  }
  ROSE_METHOD float gradient(float g) const { return mul(mul(g, scale), clip); }

  // Of M (element.h) for an element, from the lowest bits of its masks. Where M is no fraction, any
  // but 0 says that it is 1.
  ROSE_METHOD int weight(unsigned first, unsigned second) const {
    return base_weight + (int)(first & 1u) + 2 * (int)(second & 1u);
  }

  ROSE_METHOD Rounded rounded(int operand) const {
    return operand == 0 ? Rounded::kParameter : Rounded::kSecondMoment;
  }
  // Element i, which lies at `place`.
  ROSE_METHOD void store(int operand, int64_t i, int64_t place, float x) const {
    const bool is_narrow = segment->dtype[operand] == Dtype::kBFloat16;
    if (is_narrow && (operand == 3 || (operand == 0 && stochastic))) {
      const uint32_t random = rounding_bits(random_key, (uint64_t)(offset + i), rounded(operand));
      write<uint16_t>(segment->data[operand], place, float_to_bf16_stochastic(x, random));
    } else {
      write_element(segment->data[operand], segment->dtype[operand], place, x);
    }
  }
  ROSE_METHOD float load(int operand, int64_t place) const {
    return read_element(segment->data[operand], segment->dtype[operand], place);
  }
};

// 16 random bits for each of the elements from i on, as rounding_bits has them: two in a word.
template <int kCount>
struct RandomWords {
  uint32_t words[kCount / 2];

  ROSE_METHOD RandomWords(const Updated& u, int operand, int64_t i, bool are_wanted) : words{} {
    if (!are_wanted) return;
    const uint64_t index = (uint64_t)(u.offset + i);
    const uint64_t even = index & ~(uint64_t)1;
    const uint32_t high = (uint32_t)(even >> 32), key = mix(high ^ u.random_key);
    const auto word = [&](int k) {
      const uint64_t at = even + 2 * k;
      const uint32_t low = rounding_word((uint32_t)at, u.rounded(operand));
      const uint32_t its_high = (uint32_t)(at >> 32);
      return mix(low ^ (its_high == high ? key : mix(its_high ^ u.random_key)));
    };
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) words[k] = word(k);
    if (even == index) return;
    const uint32_t last = word(kCount / 2);  // neighbours have a word each
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      words[k] = words[k] >> 16 | (k + 1 < kCount / 2 ? words[k + 1] : last) << 16;
    }
  }
  ROSE_METHOD uint32_t of(int j) const { return words[j / 2] >> (j % 2 * 16); }
};

// Elements k and k + 1, rounded. Whether there is a NaN among them, which this is not for: put_pair
// rounds to bfloat16 by the hardware, whose NaN is another one, or by an addition that may overflow.
template <int kCount>
ROSE_DEVICE bool put_pair(Raw<kCount>& raw, Dtype dtype, int k, const float (&x)[2], bool randomly,
                          const RandomWords<kCount>& random) {
  if (dtype != Dtype::kBFloat16) {
    put(raw, dtype, k, x[0]);
    put(raw, dtype, k + 1, x[1]);
    return false;
  }
  const uint32_t bits = random.words[k / 2];
  raw.words[k / 2] =
      randomly ? high_halves(float_bits(x[0]) + (bits & 0xFFFFu), float_bits(x[1]) + (bits >> 16))
               : pack_bf16(x[0], x[1]);
  return (x[0] != x[0]) | (x[1] != x[1]);
}

// Updates a run of a segment that is ruled out: only the second moment changes, which takes the first
// moment for the gradient.
ROSE_DEVICE void decay(const Updated& u, const Run& run) {
  const Segment& segment = *u.segment;
  const int vectors =
      for_vectors(segment, true, run.count, [&](auto types, int middle) ROSE_ALWAYS_INLINE {
        constexpr int kCount = decltype(types)::kCount;
        const Dtype of_m = types.of(2, segment.dtype[2]), of_v = types.of(3, segment.dtype[3]);
        const char* const m_data = data_from(segment, 2, of_m, run.begin);
        char* const v_data = data_from(segment, 3, of_v, run.begin);
#pragma unroll 1
        for (int i = threadIdx.x * kCount; i < middle; i += kThreads * kCount) {
          const auto m = read_vector<kCount>(m_data, of_m, i);
          auto v = read_vector<kCount>(v_data, of_v, i);
          const RandomWords<kCount> random(u, 3, run.begin + i, of_v == Dtype::kBFloat16);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            const float next = second_moment(get(v, of_v, j), get(m, of_m, j), u.update);
            if (of_v == Dtype::kBFloat16) {
              put(v, j, float_to_bf16_stochastic(next, random.of(j)));
            } else {
              put(v, of_v, j, next);
            }
          }
          write_vector<kCount>(v_data, of_v, i, v);
        }
      });
#pragma unroll 1
  for (int64_t i = run.begin + vectors + threadIdx.x; i < run.begin + run.count; i += kThreads) {
    int64_t places[kOperands];
    locate(u.dims, segment, i, places);
    u.store(3, i, places[3], second_moment(u.load(3, places[3]), u.load(2, places[2]), u.update));
  }
}

// Updates a run of a segment. `kRanked`: its second-order mask is found on the way.
//
// One long function on purpose: what it loads is to stay in registers from the comparison to the store.
template <bool kFractional, bool kRanked, typename Notes>
ROSE_DEVICE void update_run(const Updated& u, bool rank_inactive, const Run& run, Notes& notes,
                            unsigned& updated) {
  const Segment& segment = *u.segment;
  const bool is_checked = !kRanked && segment.selective;  // for NaN and inf
  const int64_t base = segment.first_tile * kTile + run.begin;
  const auto key_of = [&](float scaled, float m) ROSE_ALWAYS_INLINE {
    if (kRanked) return second_order_key(scaled, m, u.judge.alpha, rank_inactive);
    const bool is_finite = abs_bits(scaled) < kInfinityBits && abs_bits(m) < kInfinityBits;
    return is_finite ? 0u : kNonfiniteKey;
  };
  const bool is_usual = u.has_one_factor && (!kRanked || u.has_one_threshold);
  const int vectors =
      for_vectors(segment, is_usual, run.count, [&](auto types, int middle) ROSE_ALWAYS_INLINE {
        using Types = decltype(types);
        constexpr int kCount = Types::kCount;
        const Dtype of_p = types.of(0, segment.dtype[0]), of_g = types.of(1, segment.dtype[1]);
        const Dtype of_m = types.of(2, segment.dtype[2]), of_v = types.of(3, segment.dtype[3]);
        char* const p_data = data_from(segment, 0, of_p, run.begin);
        const char* const g_data = data_from(segment, 1, of_g, run.begin);
        char* const m_data = data_from(segment, 2, of_m, run.begin);
        char* const v_data = data_from(segment, 3, of_v, run.begin);
#pragma unroll 1
        for (int i = threadIdx.x * kCount; i < middle; i += kThreads * kCount) {
          keep_in_memory();
          const auto raw_g = read_vector<kCount>(g_data, of_g, i);
          auto raw_m = read_vector<kCount>(m_data, of_m, i);
          auto raw_p = read_vector<kCount>(p_data, of_p, i);
          auto raw_v = read_vector<kCount>(v_data, of_v, i);
          keep_in_memory();  // these loads are not to wait for what the first of them decide
          const auto scaled = [&](float g) {
            return Types::kIsUsual ? mul(g, u.factor) : u.gradient(g);
          };
          const auto gradient = [&](int j) { return scaled(get(raw_g, of_g, j)); };
          // Masks of one order alone are the same whichever it is.
          constexpr bool kAlone = kRanked && !kFractional;
          const unsigned first = kAlone ? 0 : u.mask_bits(0, run.begin + i);
          unsigned second = kRanked ? 0 : u.mask_bits(1, run.begin + i), nonfinite = 0;
          Verdict verdict;
          if (kRanked) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
              u.judge.template judge<Types::kIsUsual>(gradient(j), get(raw_m, of_m, j), j, verdict);
            }
          } else if (is_checked) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {  // sums that overflow are looked at, too
              const float sum = add(fabsf(gradient(j)), fabsf(get(raw_m, of_m, j)));
              verdict.unsure |= (unsigned)!(sum < bits_float(kInfinityBits)) << j;
            }
          }
          if ((kRanked || is_checked) && __ballot_sync(kFullWarp, verdict.unsure != 0) != 0) {
            if (kRanked) {
              const auto moment = [&](int j) { return get(raw_m, of_m, j); };
              u.judge.template find_inactive<kCount>(gradient, moment, verdict);
              notes.count(verdict);
            }
            unsigned selected = verdict.selected;
            examine(
                verdict.unsure, i, base, selected, nonfinite, notes,
                [&](int j) {
                  const float g = scaled(read_element(g_data, of_g, i + j));
                  return key_of(g, read_element(m_data, of_m, i + j));
                },
                [&](int j, float& p, float& m, float& v) {
                  p = read_element(p_data, of_p, i + j);
                  m = read_element(m_data, of_m, i + j);
                  v = read_element(v_data, of_v, i + j);
                });
            if (kRanked) second = selected;
          } else if (kRanked) {
            notes.count(verdict);
            second = verdict.selected;
          }
          constexpr unsigned kAll = (1u << kCount) - 1;
          const bool base = !kAlone && u.base_weight != 0;
          const unsigned on = (base ? kAll : (first | second) & kAll) & ~nonfinite;
          updated += (unsigned)__popc(on);
          const bool rounds_p = of_p == Dtype::kBFloat16 && u.stochastic;
          const RandomWords<kCount> random_p(u, 0, run.begin + i, rounds_p);
          const RandomWords<kCount> random_v(u, 3, run.begin + i, of_v == Dtype::kBFloat16);
          const auto weight = [&](int j) {
            return (on >> j & 1u) == 0 ? 0 : kFractional ? u.weight(first >> j, second >> j) : 3;
          };
          bool has_nan = false;
#pragma unroll
          for (int k = 0; k < kCount; k += 2) {
            float p[2], m[2], v[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int j = k + h;
              p[h] = get(raw_p, of_p, j), m[h] = get(raw_m, of_m, j), v[h] = get(raw_v, of_v, j);
              adamw_element<kFractional>(p[h], m[h], v[h], gradient(j), weight(j), u.update);
            }
            has_nan |= put_pair(raw_p, of_p, k, p, rounds_p, random_p);
            has_nan |= put_pair(raw_m, of_m, k, m, false, random_v);
            has_nan |= put_pair(raw_v, of_v, k, v, true, random_v);
          }
          if (!has_nan) {
            write_vector<kCount>(p_data, of_p, i, raw_p);
            write_vector<kCount>(m_data, of_m, i, raw_m);
            write_vector<kCount>(v_data, of_v, i, raw_v);
          } else {
#pragma unroll 1
            for (int j = 0; j < kCount; ++j) {
              const int64_t at = run.begin + i + j;
              float p = u.load(0, at), m = u.load(2, at), v = u.load(3, at);
              adamw_element<kFractional>(p, m, v, u.gradient(u.load(1, at)), weight(j), u.update);
              u.store(0, at, at, p);
              u.store(2, at, at, m);
              u.store(3, at, at, v);
            }
          }
        }
      });
#pragma unroll 1
  for (int start = vectors + warp() * kWarp; start < run.count; start += kThreads) {
    const int element = start + lane();
    const int64_t i = run.begin + element;
    const bool is_there = element < run.count;
    int64_t places[kOperands] = {};
    float p = 0.0f, g = 0.0f, m = 0.0f, v = 0.0f;
    if (is_there) {
      locate(u.dims, segment, i, places);
      p = u.load(0, places[0]), g = u.gradient(u.load(1, places[1]));
      m = u.load(2, places[2]), v = u.load(3, places[3]);
    }
    unsigned selected = 0, nonfinite = 0;
    if (kRanked || is_checked) {
      examine(
          is_there, element, base, selected, nonfinite, notes, [&](int) { return key_of(g, m); },
          [&](int, float& old_p, float& old_m, float& old_v) { old_p = p, old_m = m, old_v = v; });
    }
    if (!is_there) continue;
    int weight = u.weight(u.mask_bits(0, i), kRanked ? selected : u.mask_bits(1, i));
    if (nonfinite != 0) weight = 0;
    if (!kFractional && weight != 0) weight = 3;
    updated += weight != 0;
    adamw_element<kFractional>(p, m, v, g, weight, u.update);
    u.store(0, i, places[0], p);
    u.store(2, i, places[2], m);
    u.store(3, i, places[3], v);
  }
  notes.end_run(base);
}

// Updates this block's share of the elements. `notes` are told of those that are ranked on the way.
template <bool kFractional, bool kRanked, typename Notes>
ROSE_DEVICE void update_share(const UpdateArguments& a, Notes& notes, uint32_t* counts) {
  __shared__ Updated u;
  unsigned updated = 0;
  for_each_run(a.table, [&](const Run& run) ROSE_ALWAYS_INLINE {
    if (threadIdx.x == 0) u.fill(a, run.segment, notes);
    __syncthreads();
    if (!kRanked && u.ruled_out) {
      decay(u, run);
    } else if (kRanked && u.segment->selective) {
      update_run<kFractional, true>(u, a.rank_inactive, run, notes, updated);
    } else {
      NoNotes nothing = {{-1, -1}, &counts[kNonfinite]};
      update_run<kFractional, false>(u, a.rank_inactive, run, nothing, updated);
    }
  });
  add_to_block(&counts[kUpdated], updated);
}

// Adds a block's counts to those of an update. After a barrier.
ROSE_DEVICE void flush_counts(const UpdateArguments& a, const uint32_t* counts) {
  if (threadIdx.x == 0 && counts[kUpdated] != 0) atomicAdd(&a.counts[0], (Count)counts[kUpdated]);
  if (threadIdx.x == 0 && counts[kNonfinite] != 0) atomicAdd(&a.counts[1], (Count)counts[kNonfinite]);
}

// Updates by thresholds that are known, or by masks alone. By a whole block.
template <bool kFractional, bool kRanked>
ROSE_DEVICE void update(const UpdateArguments& a) {
  __shared__ uint32_t counts[kCounts];
  clear<kCounts>(counts);
  __syncthreads();
  NoNotes notes = {kRanked ? read_bounds(a.known) : Bounds{-1, -1}, &counts[kNonfinite]};
  update_share<kFractional, kRanked>(a, notes, counts);
  __syncthreads();
  flush_counts(a, counts);
}

template <bool kFractional>
static __global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(UpdateArguments a) {
  if (!is_set(a.found_inf)) update<kFractional, false>(a);
}

}  // namespace cuda
}  // namespace rose
