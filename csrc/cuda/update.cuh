// Capturing masks, the masked AdamW, and sums of squares.
#pragma once

#include "keys.cuh"

namespace rose {
namespace cuda {

ROSE_DEVICE Bounds read_bounds(const int64_t* selection) {
  return {(int32_t)selection[0], (int32_t)selection[1]};
}

// An element before its update.
struct Entry {
  uint32_t key;
  float p, m, v;
};

enum { kUpdated, kNonfinite, kUpdateFields };  // what a thread counts

// Counts of a thread, in registers.
struct Counters {
  unsigned values[kUpdateFields] = {};

  ROSE_METHOD void count(int field, bool is) { values[field] += is; }
  ROSE_METHOD void end_tile() {}
  ROSE_METHOD unsigned operator[](int field) const { return values[field]; }
};

// What a pass over the elements does with their keys besides treating them: nothing.
struct NoNotes {
  static constexpr bool kAny = false;
  Counters counts;

  // Whether an element is to be logged.
  ROSE_METHOD bool look(uint32_t key) { return false; }
  // Room in the log for those of a lane's kCount elements whose bits are set. By whole warps.
  template <int kCount>
  ROSE_METHOD int reserve(unsigned inside) {
    return 0;
  }
  // Writes them there. The first is at `place`; entry_of(j): an Entry.
  template <int kCount, typename Entries>
  ROSE_METHOD void log(unsigned inside, int entry, int64_t place, Entries entry_of) {}
};

// --------------------------------------------------------------------------------------------- capture

template <typename Notes>
ROSE_DEVICE void capture_tiles(const Risk& risk, Bounds bounds, Notes& notes) {
  const Factors factors = factors_of(risk);
  for_each_tile(risk.table, [&](int index, int64_t tile, int64_t start, int count) {
    uint8_t* const bits = risk.table.segments[index].bits;
    for_each_key(
        risk, factors, risk.table.segments[index], start, count,
        [&](int i, const uint32_t (&keys)[kVector]) {
          unsigned half = 0, inside = 0;
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            half |= (unsigned)if_selected(keys[j], bounds, 1) << j;
            inside |= (unsigned)notes.look(keys[j]) << j;
            notes.counts.count(kNonfinite, keys[j] == kNonfiniteKey);
          }
          // Two lanes have a byte between them.
          const unsigned byte = half | __shfl_down_sync(kFullWarp, half, 1) << kVector;
          if (keys[0] != kNoKey && lane() % 2 == 0) {
            write<uint8_t>(bits, (start + i) / 8, (uint8_t)byte);
          }
          const int entry = notes.template reserve<kVector>(inside);
          notes.template log<kVector>(inside, entry, tile * kTile + i,
                                      [&](int j) { return Entry{keys[j], 0, 0, 0}; });
        },
        [&](int i, uint32_t key) {
          const unsigned word = __ballot_sync(kFullWarp, if_selected(key, bounds, 1) != 0);
          const int first = i - lane() + lane() * 8;  // of the byte that this lane writes
          if (lane() < kWarp / 8 && first < count) {
            write<uint8_t>(bits, (start + first) / 8, (uint8_t)(word >> (lane() * 8)));
          }
          notes.counts.count(kNonfinite, key == kNonfiniteKey);
          const unsigned inside = notes.look(key);
          const int entry = notes.template reserve<1>(inside);
          notes.template log<1>(inside, entry, tile * kTile + i,
                                [&](int) { return Entry{key, 0, 0, 0}; });
        });
    notes.counts.end_tile();
  });
}

static __global__ void __launch_bounds__(kThreads) capture_kernel(CaptureArguments a) {
  NoNotes notes;
  capture_tiles(a.risk, read_bounds(a.selection), notes);
}

// ---------------------------------------------------------------------------------------------- update

ROSE_DEVICE bool is_set(const float* found_inf) { return found_inf != nullptr && *found_inf != 0; }

// What all elements of a segment have in common, and its step. One thread for a segment.
ROSE_DEVICE void prepare(const UpdateArguments& a, int i) {
  const Segment& segment = a.table.segments[i];
  const float step = *segment.step + 1.0f;
  *segment.step = step;
  Prepared& prepared = a.prepared[i];
  const double lr = a.lrs == nullptr ? a.few_lrs[segment.group] : a.lrs[segment.group];
  prepared.update = make_update(a.table.groups[segment.group], lr, step, a.gamma);
  prepared.scale = mul(segment.sign, scalar_or_one(a.inv_scale));
  prepared.clip = a.clip == nullptr ? 1.0f : a.clip[segment.selective ? 0 : 1];
  prepared.random_key = random_key(a.seed, (uint32_t)step);
  prepared.base_kind = segment.selective ? 0 : 3;
  bool has_bits = false;
  for (int k = 0; k < 2; ++k) {
    const MaskKind kind = segment.mask_kinds[k];
    has_bits = has_bits || kind == MaskKind::kBits;
    if (kind == MaskKind::kAll || (kind == MaskKind::kWhole && *segment.masks[k] != 0)) {
      prepared.base_kind += k == 0 ? a.first_weight : a.second_weight;
    }
  }
  prepared.ruled_out = prepared.base_kind == 0 && !has_bits && !a.from_risk;
}

static __global__ void __launch_bounds__(kThreads) prepare_kernel(UpdateArguments a) {
  const int i = (int)(blockIdx.x * kThreads + threadIdx.x);
  if (i == 0) a.counts[0] = a.counts[1] = 0;
  if (i < a.table.count && !is_set(a.found_inf)) prepare(a, i);
}

// One segment of an update. What is read through its references where it is used, in L1, takes no
// register across a loop.
struct Updated {
  const UpdateArguments& a;
  const Segment& segment;
  const Prepared& prepared;

  // Lowest bit: of the mask of element i.
  ROSE_METHOD unsigned mask_bits(int k, int64_t i) const {
    const bool has_bits = segment.mask_kinds[k] == MaskKind::kBits;
    return has_bits ? (unsigned)read<uint8_t>(segment.masks[k], i / 8) >> (i % 8) : 0u;
  }
  ROSE_METHOD float gradient(float g) const { return mul(mul(g, prepared.scale), prepared.clip); }
  // What captured masks say, from their lowest bits.
  ROSE_METHOD int captured_kind(unsigned first, unsigned second) const {
    return prepared.base_kind + ((first & 1u) != 0 ? a.first_weight : 0) +
           ((second & 1u) != 0 ? a.second_weight : 0);
  }
  ROSE_METHOD bool rounds_randomly(int operand) const {
    const bool narrow = segment.dtype[operand] == Dtype::kBFloat16;
    return narrow && (operand == 3 || (operand == 0 && a.stochastic));
  }
  ROSE_METHOD uint16_t round(int operand, float x, int64_t i) const {
    const Rounded what = operand == 0 ? Rounded::kParameter : Rounded::kSecondMoment;
    const uint64_t index = (uint64_t)(segment.offset + i);
    return float_to_bf16_stochastic(x, rounding_bits(prepared.random_key, index, what));
  }
  // kVector elements from i on of p, m or v.
  ROSE_METHOD void store(int operand, int64_t i, const float (&x)[kVector]) const {
    if (!rounds_randomly(operand)) {
      write_vector(segment.data[operand], segment.dtype[operand], i, x);
      return;
    }
    uint16_t h[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) h[j] = round(operand, x[j], i + j);
    write<uint2>(segment.data[operand], i / kVector, pack(h));
  }
  // Element i, which lies at `place`.
  ROSE_METHOD void store(int operand, int64_t i, int64_t place, float x) const {
    if (rounds_randomly(operand)) {
      write<uint16_t>(segment.data[operand], place, round(operand, x, i));
    } else {
      write_element(segment.data[operand], segment.dtype[operand], place, x);
    }
  }
  ROSE_METHOD float load(int operand, int64_t place) const {
    return read_element(segment.data[operand], segment.dtype[operand], place);
  }
};

// A tile of a segment that is ruled out: the second moment goes on with the first one for a gradient.
ROSE_DEVICE void decay_tile(const Updated& u, int64_t start, int count) {
  const Segment& segment = u.segment;
  const int vector = vector_part(segment, count);
#pragma unroll 1
  for (int i = threadIdx.x * kVector; i < vector; i += kThreads * kVector) {
    const Raw raw_m = read_vector(segment.data[2], segment.dtype[2], start + i);
    const Raw raw_v = read_vector(segment.data[3], segment.dtype[3], start + i);
    float m[kVector], v[kVector];
    widen(raw_m, segment.dtype[2], m);
    widen(raw_v, segment.dtype[3], v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[j] = second_moment(v[j], m[j], u.prepared.update);
    u.store(3, start + i, v);
  }
#pragma unroll 1
  for (int i = vector + threadIdx.x; i < count; i += kThreads) {
    int64_t places[kOperands];
    locate(u.a.table, segment, start + i, places);
    const float v = second_moment(u.load(3, places[3]), u.load(2, places[2]), u.prepared.update);
    u.store(3, start + i, places[3], v);
  }
}

// The elements of this block's share, treated by `bounds` where they are ranked on the way; see NoNotes
// for what else is done with those.
template <bool kFractional, typename Notes>
ROSE_DEVICE void update_tiles(const UpdateArguments& a, const Bounds& bounds, Notes& notes,
                              Count* scratch) {
  for_each_tile(a.table, [&](int index, int64_t, int64_t start, int count) {
    const Updated u = {a, a.table.segments[index], a.prepared[index]};
    const Segment& segment = u.segment;
    if (!Notes::kAny && u.prepared.ruled_out) {
      decay_tile(u, start, count);
      return;
    }
    const auto key_of = [&](float g, float m) {
      return second_order_key(g, m, segment.alpha, a.rank_inactive);
    };
    // Scales g; kind of the mask of element j, from the lowest bits of its masks.
    const auto kind_of = [&](float& g, float m, unsigned first, unsigned second, unsigned& inside,
                             int j) {
      g = u.gradient(g);
      int kind = u.captured_kind(first, second);
      if (segment.selective) {
        if (a.from_risk) {
          const uint32_t key = key_of(g, m);
          kind += if_selected(key, bounds, a.second_weight);
          inside |= (unsigned)notes.look(key) << j;
        }
        if (abs_bits(g) >= kInfinityBits || abs_bits(m) >= kInfinityBits) {
          kind = 0;
          notes.counts.count(kNonfinite, true);
        }
      }
      notes.counts.count(kUpdated, kind != 0);
      return (unsigned)kind;
    };

    // With notes, first what decides, and then the rest: all at once would not fit the registers.
    const int vector = vector_part(segment, count);
#pragma unroll 1
    for (int i = threadIdx.x * kVector, base = 0; (Notes::kAny ? base : i) < vector;
         i += kThreads * kVector, base += kThreads * kVector) {
      if (Notes::kAny) i = base + (int)this_thread() * kVector;
      const int64_t at = start + i;
      const bool is_there = i < vector;
      Raw raw_p = {}, raw_v = {};
      const auto read_rest = [&] {
        raw_p = read_vector(segment.data[0], segment.dtype[0], at);
        raw_v = read_vector(segment.data[3], segment.dtype[3], at);
      };
      float g[kVector], m[kVector];
      unsigned kinds = 0, inside = 0;
      if (is_there) {
        if (!Notes::kAny) read_rest();
        const Raw raw_g = read_vector(segment.data[1], segment.dtype[1], at);
        const Raw raw_m = read_vector(segment.data[2], segment.dtype[2], at);
        const unsigned first = u.mask_bits(0, at), second = Notes::kAny ? 0 : u.mask_bits(1, at);
        widen(raw_g, segment.dtype[1], g);
        widen(raw_m, segment.dtype[2], m);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          kinds |= kind_of(g[j], m[j], first >> j, second >> j, inside, j) << 2 * j;
        }
      }
      const int entry = notes.template reserve<kVector>(inside);
      if (!is_there) continue;
      if (Notes::kAny) read_rest();
      float p[kVector], v[kVector];
      widen(raw_p, segment.dtype[0], p);
      widen(raw_v, segment.dtype[3], v);
      notes.template log<kVector>(inside, entry, segment.first_tile * kTile + at,
                                  [&](int j) { return Entry{key_of(g[j], m[j]), p[j], m[j], v[j]}; });
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        adamw_element<kFractional>(p[j], m[j], v[j], g[j], kinds >> 2 * j & 3, u.prepared.update);
      }
      u.store(0, at, p);
      u.store(2, at, m);
      u.store(3, at, v);
    }
#pragma unroll 1
    for (int i = vector + threadIdx.x, base = vector; (Notes::kAny ? base : i) < count;
         i += kThreads, base += kThreads) {
      const int64_t at = start + i;
      const bool is_there = i < count;
      int64_t places[kOperands];
      float g = 0.0f, m = 0.0f;
      unsigned kind = 0, inside = 0;
      if (is_there) {
        locate(a.table, segment, at, places);
        g = u.load(1, places[1]), m = u.load(2, places[2]);
        kind = kind_of(g, m, u.mask_bits(0, at), Notes::kAny ? 0 : u.mask_bits(1, at), inside, 0);
      }
      const int entry = notes.template reserve<1>(inside);
      if (!is_there) continue;
      if (Notes::kAny) locate(a.table, segment, at, places);  // rather than in registers until now
      float p = u.load(0, places[0]), v = u.load(3, places[3]);
      notes.template log<1>(inside, entry, segment.first_tile * kTile + at,
                            [&](int) { return Entry{key_of(g, m), p, m, v}; });
      adamw_element<kFractional>(p, m, v, g, kind, u.prepared.update);
      u.store(0, at, places[0], p);
      u.store(2, at, places[2], m);
      u.store(3, at, places[3], v);
    }
    notes.counts.end_tile();
  });
  add_to(&a.counts[0], notes.counts[kUpdated], scratch);
  add_to(&a.counts[1], notes.counts[kNonfinite], scratch);
}

template <bool kFractional>
static __global__ void __launch_bounds__(kThreads, 4) update_kernel(UpdateArguments a) {
  __shared__ Count scratch[kThreads / kWarp];
  if (is_set(a.found_inf)) return;
  NoNotes notes;
  update_tiles<kFractional>(a, a.from_risk ? read_bounds(a.selection) : Bounds{-1, -1}, notes, scratch);
}

// ----------------------------------------------------------------------------------------------- sums

// Sums of squares of the tiles. A thread has the same elements whatever the layout, and sums have a
// fixed order, so the sum of a tensor does not depend on where it lies.
static __global__ void __launch_bounds__(kThreads) squares_kernel(SquaresArguments a) {
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

// The sum of each segment from its tiles. One block for a segment.
static __global__ void __launch_bounds__(kThreads) sums_kernel(SquaresArguments a) {
  __shared__ double scratch[kThreads / kWarp];
  for (int index = (int)blockIdx.x; index < a.table.count; index += (int)gridDim.x) {
    const Segment& segment = a.table.segments[index];
    const int64_t tiles = (segment.n + kTile - 1) / kTile;
    double sum = 0.0;
    for (int64_t t = threadIdx.x; t < tiles; t += kThreads) sum += a.partial[segment.first_tile + t];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) a.sums[index] = sum;
  }
}

}  // namespace cuda
}  // namespace rose
