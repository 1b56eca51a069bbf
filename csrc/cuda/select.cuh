// The k-th smallest of all risks, exactly, without storing them.
//
//   sample     a window around where each threshold seems to be
//   count      below each window and in its bins, and a log of the keys inside
//   histogram  (only if a threshold is not in its window) the leading 11 bits of all keys
//   narrow     twice: the next 11 bits, and the rest, of the log; or of all elements, if entries are
//   missing
//
// A radix select, whose first digit is found by comparisons. With `approx`, of a sample:
//
//   sample     logs its keys, with a histogram of their leading 11 bits
//   narrow     twice, of that log: the thresholds
//   count      of all elements, by the thresholds; or a pass that treats them, too
#pragma once

#include "log.cuh"

namespace rose {
namespace cuda {

ROSE_DEVICE void write_record(const SelectArguments& a, int64_t high, int64_t low, Count upto_high,
                              Count upto_low) {
  const SelectState& state = *a.state;
  const int64_t record[8] = {high,
                             low,
                             upto_high > upto_low ? (int64_t)(upto_high - upto_low) : 0,
                             (int64_t)state.ranked,
                             (int64_t)__ldcg(&state.counts[kInactive]),
                             (int64_t)__ldcg(&state.counts[kNonfinite]),
                             state.missed ? 1 : 0,
                             0};
#pragma unroll
  for (int i = 0; i < 8; ++i) a.record[i] = record[i];
}

// Once all elements are counted.
ROSE_DEVICE Count ranked_of(const SelectArguments& a) {
  const SelectState& state = *a.state;
  return (Count)a.elements - __ldcg(&state.counts[kInactive]) - __ldcg(&state.counts[kNonfinite]);
}

// Whether single gradients are multiplied by one factor at most, so that loops need not look at two:
// 1 changes nothing, and a product with -1 is not rounded.
ROSE_DEVICE bool is_one_factor(Factors factors) {
  return fabsf(factors.inv_scale) == 1.0f || factors.clip == 1.0f;
}

// Finds which elements of this block's share are selected: by comparisons, and by keys where those are
// not sure. Calls write(segment, position of the first, bits of those that are selected, how many) for
// the elements of each lane, by whole warps.
template <bool kSecondOrder, typename Notes, typename Write>
ROSE_DEVICE void settle(const Risk& risk, Notes& notes, Write write) {
  const Factors factors = factors_of(risk);
  const float factor = mul(factors.inv_scale, factors.clip);
  const bool is_usual = is_one_factor(factors) && notes.has_one_threshold();
  for_each_run(risk.table, [&](const Run& run) ROSE_ALWAYS_INLINE {
    const Segment& segment = risk.table.segments[run.segment];
    if (!segment.selective) return;
    const Judge<kSecondOrder> judge =
        notes.template judge<kSecondOrder>(segment.alpha, risk.rank_inactive);
    const int64_t base = segment.first_tile * kTile + run.begin;
    const auto no_old = [](int, float&, float&, float&) {};
    // One operand alone: twice the elements, or too few bytes would be on their way.
    constexpr int kTimes = kSecondOrder ? 1 : 2;
    const int vectors = for_vectors<kTimes>(
        segment, is_usual, run.count, [&](auto types, int middle) ROSE_ALWAYS_INLINE {
          using Types = decltype(types);
          constexpr int kCount = (Types::kIsUsual ? kTimes : 1) * Types::kCount;
          const Dtype of_g = types.of(1, segment.dtype[risk.operand]);
          const Dtype of_m = types.of(2, segment.dtype[risk.operand + 1]);
          const char* const g_data = data_from(segment, risk.operand, of_g, run.begin);
          const char* const m_data = data_from(segment, risk.operand + 1, of_m, run.begin);
#pragma unroll 1
          for (int i = threadIdx.x * kCount; i < middle; i += kThreads * kCount) {
            const auto raw_g = read_vector<kCount>(g_data, of_g, i);
            const auto raw_m = kSecondOrder ? read_vector<kCount>(m_data, of_m, i) : Raw<kCount>();
            const auto scaled = [&](float g) {
              return Types::kIsUsual ? mul(g, factor) : factors.scaled(g);
            };
            const auto gradient = [&](int j) { return scaled(get(raw_g, of_g, j)); };
            const auto moment = [&](int j) { return kSecondOrder ? get(raw_m, of_m, j) : 0.0f; };
            Verdict verdict;
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
              judge.template judge<Types::kIsUsual>(gradient(j), moment(j), j, verdict);
            }
            if (__ballot_sync(kFullWarp, verdict.unsure != 0) != 0) {
              judge.template find_inactive<kCount>(gradient, moment, verdict);
              notes.count(verdict);
              unsigned nonfinite = 0;
              examine(
                  verdict.unsure, i, base, verdict.selected, nonfinite, notes,
                  [&](int j) {
                    const float g = scaled(read_element(g_data, of_g, i + j));
                    const float m = kSecondOrder ? read_element(m_data, of_m, i + j) : 0.0f;
                    return kSecondOrder ? second_order_key(g, m, judge.alpha, risk.rank_inactive)
                                        : first_order_key(g, risk.rank_inactive);
                  },
                  no_old);
            } else {
              notes.count(verdict);
            }
            write(segment, run.begin + i, verdict.selected, kCount);
          }
        });
#pragma unroll 1
    for (int first = vectors + warp() * kWarp; first < run.count; first += kThreads) {
      const int i = first + lane();
      unsigned selected = 0, nonfinite = 0;
      examine(
          i < run.count, i, base, selected, nonfinite, notes,
          [&](int) { return key_at(risk, factors, segment, run.begin + i); }, no_old);
      write(segment, run.begin + i, selected, i < run.count ? 1 : 0);
    }
    notes.end_run(base);
  });
}

template <typename Notes, typename Write>
ROSE_DEVICE void settle(const Risk& risk, Notes& notes, Write write) {
  if (risk.second_order) {
    settle<true>(risk, notes, write);
  } else {
    settle<false>(risk, notes, write);
  }
}

// --------------------------------------------------------------------------------------------- sample

constexpr int kLeadingShift = kKeyBits - 11;

// Begins the search for the thresholds with a histogram of the leading 11 bits. By a whole block.
template <typename T>
ROSE_DEVICE void find_leading(const SelectArguments& a, const T* histogram, bool logged) {
  Bin bin;
  const int64_t ranked = (int64_t)find_bin<kBins>(histogram, 0, bin);
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    const Count rank = (Count)rank_of(t == 0 ? a.upper : a.lower, ranked);
    if (rank == 0) continue;
    find_bin<kBins>(histogram, rank, bin);
    if (threadIdx.x != 0) continue;
    a.state->thresholds[t] = {rank,          bin.below, bin.inside, bin.index << kLeadingShift,
                              kLeadingShift, true,      logged};
  }
}

// Logs the keys of a sample. For a whole grid.
ROSE_DEVICE void log_sample(const SelectArguments& a) {
  constexpr int kAtOnce = 4;
  __shared__ uint32_t bins[kBins];
  const Factors factors = factors_of(a.risk);
  clear<kBins>(bins);
  __syncthreads();
  const int64_t size = a.strata.count * kLine, stride = (int64_t)gridDim.x * kThreads;
#pragma unroll 1
  for (int64_t first = (int64_t)blockIdx.x * kThreads + threadIdx.x; first < size;
       first += kAtOnce * stride) {
    int64_t strata[kAtOnce];
    uint32_t keys[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) strata[k] = (first + k * stride) / kLine;
    sampled_keys<kAtOnce>(a, factors, strata, lane() % kLine, keys);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (strata[k] < a.strata.count) write<uint32_t>(a.log.keys, first + k * stride, keys[k]);
      if (keys[k] != kNoKey) atomicAdd(&bins[keys[k] >> kLeadingShift], 1u);
    }
  }
  __syncthreads();
  Sample& sample = *a.sample;
  flush<kBins>(bins, sample.bins[0]);
  if (!is_last_block(&sample.ticket)) return;
  find_leading(a, sample.bins[0], true);
  clear<kBins>(sample.bins[0]);
  if (threadIdx.x != 0) return;
  sample.ticket = 0;
  a.state->log_size = (Count)size;
  a.state->course = Course::kSpeculative;
}

ROSE_DEVICE void sample(const SelectArguments& a) {
  if (a.approx) {
    log_sample(a);
  } else {
    take_sample(a);
  }
}

static __global__ void __launch_bounds__(kThreads, 3) sample_kernel(SelectArguments a) {
  clear_state(*a.state);
  sample(a);
}

// ---------------------------------------------------------------------------------------------- count

// Ends a pass by thresholds that a sample gave: the last block to come here has all counts.
ROSE_DEVICE void end_approx(const SelectArguments& a) {
  SelectState& state = *a.state;
  if (!is_last_block(&state.tickets[0]) || threadIdx.x != 0) return;
  state.ranked = ranked_of(a);
  Count upto[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    if (a.record[t] < 0) continue;
    upto[t] = __ldcg(&state.counts[kBelowUpper + t]) + __ldcg(&state.of_windows[t][0]);
  }
  write_record(a, a.record[0], a.record[1], upto[0], upto[1]);
}

// For a whole grid.
ROSE_DEVICE void count(const SelectArguments& a, Counts& shared) {
  SelectState& state = *a.state;
  Logged<false> notes(a, shared);
  settle(a.risk, notes, [](const Segment&, int64_t, unsigned, int) {});
  notes.finish();
  if (a.approx) {
    end_approx(a);
    return;
  }
  if (!is_last_block(&state.tickets[0])) return;
  const Count ranked = ranked_of(a);
  const bool logged = __ldcg(&state.overflowed) == 0;
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    const Count rank = (Count)rank_of(t == 0 ? a.upper : a.lower, (int64_t)ranked);
    if (rank == 0) continue;
    const Window window = state.windows[t];
    const Count below = __ldcg(&state.counts[kBelowUpper + t]);
    Bin bin;
    const Count inside = find_bin<kBins>(state.of_windows[t], rank > below ? rank - below : 0, bin);
    const bool is_inside = below < rank && rank <= below + inside;
    if (threadIdx.x == 0) {
      state.thresholds[t] = {rank,         below + bin.below,
                             bin.inside,   window.low + (bin.index << window.shift),
                             window.shift, true,
                             logged};
      if (!is_inside) state.unlucky = true;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) state.ranked = ranked;
  clear<2 * kBins>(state.of_windows[0]);
}

static __global__ void __launch_bounds__(kThreads, 4) count_kernel(SelectArguments a) {
  __shared__ Counts shared;
  count(a, shared);
}

// ------------------------------------------------------------------------------------------ histogram

static __global__ void __launch_bounds__(kThreads, 4) histogram_kernel(SelectArguments a) {
  __shared__ uint32_t histogram[kBins];
  SelectState& state = *a.state;
  if (!state.unlucky) return;
  clear<kBins>(histogram);
  __syncthreads();
  for_each_key(a.risk, [&](uint32_t key) {
    if (key < kInactiveKey) atomicAdd(&histogram[key >> kLeadingShift], 1u);
  });
  __syncthreads();
  flush<kBins>(histogram, state.histogram);
  if (is_last_block(&state.tickets[3])) find_leading(a, state.histogram, false);
}

// --------------------------------------------------------------------------------------------- narrow

template <bool kLast>
static __global__ void __launch_bounds__(kThreads, 4) narrow_kernel(SelectArguments a) {
  __shared__ uint32_t histogram[2][kBins];
  SelectState& state = *a.state;
  uint32_t low[2], of_log[2], of_all[2];  // intervals to count, from the log and from all elements
  int shift[2];
  bool counts[2] = {false, false};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Threshold& threshold = state.thresholds[t];
    const bool open = threshold.searching && threshold.bits > 0;
    const uint32_t size = open ? 1u << threshold.bits : 0;
    low[t] = threshold.low;
    of_log[t] = threshold.logged ? size : 0;
    of_all[t] = threshold.logged ? 0 : size;
    counts[0] = counts[0] || of_log[t] != 0;
    counts[1] = counts[1] || of_all[t] != 0;
    shift[t] = threshold.bits > 11 ? threshold.bits - 11 : 0;
  }
  if (counts[0] || counts[1]) {
    clear<2 * kBins>(histogram[0]);
    __syncthreads();
    const auto count = [&](uint32_t key, const uint32_t (&size)[2]) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if (key - low[t] < size[t]) atomicAdd(&histogram[t][(key - low[t]) >> shift[t]], 1u);
      }
    };
    if (counts[0]) {
      const Count size = state.log_size, capacity = (Count)a.log.capacity;
      const int64_t stop = (int64_t)(size < capacity ? size : capacity);
#pragma unroll 4
      for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < stop;
           i += (int64_t)gridDim.x * kThreads) {
        count(read<uint32_t>(a.log.keys, i) & ~kInactiveKey, of_log);
      }
    }
    if (counts[1]) for_each_key(a.risk, [&](uint32_t key) { count(key, of_all); });
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 2; ++t) flush<kBins>(histogram[t], state.of_windows[t]);
    if (!is_last_block(&state.tickets[kLast ? 2 : 1])) return;
#pragma unroll 1
    for (int t = 0; t < 2; ++t) {
      Threshold threshold = state.thresholds[t];
      if (!threshold.searching || threshold.bits == 0) continue;
      Bin bin;
      find_bin<kBins>(state.of_windows[t], threshold.rank - threshold.below, bin);
      const int bits = threshold.bits > 11 ? threshold.bits - 11 : 0;
      threshold.below += bin.below;
      threshold.inside = bin.inside;
      threshold.low += bin.index << bits;
      threshold.bits = bits;
      __syncthreads();
      if (threadIdx.x == 0) state.thresholds[t] = threshold;
    }
    __syncthreads();
    if (!kLast || a.approx) clear<2 * kBins>(state.of_windows[0]);
  } else if (blockIdx.x != 0) {
    return;
  }
  if (!kLast || threadIdx.x != 0) return;
  int64_t keys[2] = {-1, -1};
  Count upto[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Threshold& threshold = state.thresholds[t];
    if (!threshold.searching) continue;
    keys[t] = threshold.low;
    upto[t] = threshold.below + threshold.inside;
  }
  write_record(a, keys[0], keys[1], upto[0], upto[1]);
  if (!a.approx) return;
  // Of a sample: what the pass after it goes by, brackets of one key each, of which nothing is logged.
  state.estimate = {(int32_t)keys[0], (int32_t)keys[1]};
#pragma unroll
  for (int t = 0; t < 2; ++t) state.windows[t] = {(uint32_t)keys[t], 0, 0, false};
}

}  // namespace cuda
}  // namespace rose
