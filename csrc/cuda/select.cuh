// The k-th smallest of all risks, exactly: a radix select over keys that are recomputed from gradients
// and moments in every pass, never stored.
//
// A pass counts keys in 2048 bins of an interval that holds the threshold, and goes on with one of
// them: 31 bits take three passes. Pass 1 also has a window around where a small sample has the
// threshold. It counts the window in bins of its own and logs its keys, so that (unless the sample was
// unlucky or the log too small, which costs time only) the other passes start from a narrow interval,
// read the log and no tensor.
#pragma once

#include "keys.cuh"

namespace rose {
namespace cuda {

// Bin of a histogram that holds the `rank`-th smallest, from 1, and how many are in the bins before it
// (zeros if it has fewer, or for rank 0); returns the sum of all bins. For a whole block.
struct Bin {
  uint32_t index;
  Count below, inside;
};

template <int kCount, typename T>
ROSE_DEVICE Count find_bin(const T* histogram, Count rank, Bin& bin) {
  constexpr int kOwn = kCount / kThreads;
  __shared__ Count of_warps[kThreads / kWarp];
  __shared__ Bin found;
  Count own = 0;
#pragma unroll 4
  for (int i = 0; i < kOwn; ++i) own += __ldcg(histogram + threadIdx.x * kOwn + i);
  Count upto = own;  // inclusive sum over the threads of the warp, then of the block
  for (int d = 1; d < kWarp; d *= 2) {
    const Count before = __shfl_up_sync(kFullWarp, upto, d);
    if (lane() >= d) upto += before;
  }
  __syncthreads();  // of the last use
  if (lane() == kWarp - 1) of_warps[warp()] = upto;
  if (threadIdx.x == 0) found = {0, 0, 0};
  __syncthreads();
  Count total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w == warp()) upto += total;
    total += of_warps[w];
  }
  Count below = upto - own;
  if (below < rank && rank <= upto) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x * kOwn;; ++i) {
      const Count inside = __ldcg(histogram + i);
      if (rank <= below + inside) {
        found = {i, below, inside};
        break;
      }
      below += inside;
    }
  }
  __syncthreads();
  bin = found;
  return total;
}

// Adds a block's counts to those of all blocks, once.
template <int kCount, typename From, typename To>
ROSE_DEVICE void flush(const From* block, To* all) {
  for (int i = threadIdx.x; i < kCount; i += kThreads) {
    if (block[i] != 0) atomicAdd(all + i, (To)block[i]);
  }
}

template <int kCount, typename T>
ROSE_DEVICE void clear(T* block) {
  for (int i = threadIdx.x; i < kCount; i += kThreads) block[i] = 0;
}

ROSE_DEVICE void write_selection(const SelectArguments& a, int64_t high, int64_t low, Count upto_high,
                                 Count upto_low) {
  const Count kept = upto_high > upto_low ? upto_high - upto_low : 0;
  const SelectState& state = *a.state;
  const int64_t record[8] = {high,
                             low,
                             (int64_t)kept,
                             (int64_t)state.ranked,
                             (int64_t)state.inactive,
                             (int64_t)state.nonfinite,
                             state.missed ? 1 : 0,
                             0};
#pragma unroll
  for (int i = 0; i < 8; ++i) a.selection[i] = record[i];
}

// ---------------------------------------------------------------------------------------------- sample

// Where a sample is looked at closely, from a pilot that every block reads: around its quantile, whose
// variance is measured there, and at a key that many elements have, if there is one.
struct View {
  Window window;
  uint32_t middle;  // the quantile
  uint32_t pivot;   // that key, or kNoKey
};

constexpr int kPilot = 2 * kThreads;  // keys

// Key of an element of the line that is drawn from a stratum; kNoKey if it is not ranked or not there.
ROSE_DEVICE uint32_t sampled_key(const SelectArguments& a, Factors factors, int64_t stratum,
                                 int element) {
  const Table& table = a.risk.table;
  const uint64_t random = random_bits(a.draw, (uint32_t)(stratum >> 32), (uint32_t)stratum);
  const int64_t line = stratum * a.stratum + (int64_t)(random * (uint64_t)a.stratum >> 32);
  if (stratum >= a.lines || line >= table.lines) return kNoKey;
  const Segment& segment = table.segments[find_segment<&Segment::first_line>(table, line)];
  const int64_t i = (line - segment.first_line) * kLine + element;
  if (i >= segment.n) return kNoKey;
  const uint32_t key = key_at(a.risk, factors, segment, i);
  return key < kInactiveKey ? key : kNoKey;
}

// Sorts 2 * kThreads keys in shared memory. Bitonic: every thread has a pair in every step.
ROSE_DEVICE void sort(uint32_t* keys) {
#pragma unroll 1
  for (int size = 2; size <= kPilot; size *= 2) {
#pragma unroll 1
    for (int distance = size / 2; distance > 0; distance /= 2) {
      __syncthreads();
      const int i = 2 * (int)threadIdx.x - ((int)threadIdx.x & (distance - 1));
      const uint32_t first = keys[i], second = keys[i + distance];
      if ((first > second) == ((i & size) == 0)) {
        keys[i] = second;
        keys[i + distance] = first;
      }
    }
  }
  __syncthreads();
}

// From quantiles at 5 standard errors (if elements of a line are as alike as 2 in 3) on each side.
// `keys`: sorted, of which `size` are ranked.
ROSE_DEVICE View view_of(const uint32_t* keys, int size, int64_t fraction) {
  const double q = (double)fraction * 1e-9, position = q * size;
  const double margin = 5.0 * sqrt(2.0 * size * q * (1.0 - q)) + 2.0 * kLine;
  const double from = position - margin, upto = position + margin;
  View view = {{0, kInfinityBits, 0, true}, kInfinityBits, kNoKey};
  if (size == 0) return view;
  const int middle = position < size ? (int)position : size - 1;
  if (from > 0.0) view.window.low = keys[(int)from];
  view.window.width = (upto < size ? keys[(int)upto] : kInfinityBits) - view.window.low;
  while (view.window.width >> view.window.shift >= kBins) ++view.window.shift;
  view.middle = keys[middle];
  // A run of equal keys, looked for from the quantile outwards.
  constexpr int kRun = 8, kFarthest = 48;
#pragma unroll 1
  for (int distance = 0; distance <= kFarthest; distance += kRun) {
#pragma unroll 1
    for (int sign = -1; sign <= 1; sign += 2) {
      const int at = middle + sign * distance;
      if (at < 0 || at + kRun > size || keys[at] != keys[at + kRun - 1]) continue;
      view.pivot = keys[at];
      return view;
    }
  }
  return view;
}

ROSE_DEVICE View no_view() { return {{kNoKey, 0, 0, false}, kNoKey, kNoKey}; }

ROSE_DEVICE void read_pilot(const SelectArguments& a, Factors factors, View* views) {
  __shared__ uint32_t keys[kPilot];
  __shared__ int size;
  if (threadIdx.x == 0) size = 0;
  const int64_t apart = a.lines * kLine > kPilot ? a.lines / (kPilot / kLine) : 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < kPilot; i += kThreads) {
    keys[i] = sampled_key(a, factors, i / kLine * apart, i % kLine);
  }
  sort(keys);
  for (int i = threadIdx.x; i < kPilot; i += kThreads) {
    if (keys[i] != kNoKey && (i + 1 == kPilot || keys[i + 1] == kNoKey)) size = i + 1;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    const int64_t fraction = threadIdx.x == 0 ? a.upper : a.lower;
    const bool wanted = fraction > 0 && !a.approx;
    views[threadIdx.x] = wanted ? view_of(keys, size, fraction) : no_view();
  }
  __syncthreads();
}

// What the sample says of a threshold.
struct Plan {
  Window window;
  uint32_t estimate;  // of the threshold, the last key of a bin; kNoKey if there is none
  double logged;      // keys to log, in a sample; infinite if the window does not hold the bracket
};

// A window is a few standard errors wide, and missing it costs time. A bracket must not be missed: see
// bracket_adamw_ in rose_ops/reference.py. For a whole block.
ROSE_DEVICE Plan plan_of(const SelectArguments& a, const View& view, int t, bool is_bracket) {
  const uint32_t* bins = a.sample->bins[t];
  const SampleSums& sums = a.sample->sums;
  const Window& window = view.window;
  if (window.low == kNoKey) return {window, kNoKey, 0.0};
  const double q = (double)(t == 0 ? a.upper : a.lower) * 1e-9;
  const double ranked = (double)__ldcg(&sums.ranked);
  const double u = (double)(int64_t)__ldcg(&sums.dc_dc[t]) -
                   2.0 * q * (double)(int64_t)__ldcg(&sums.dc_dr[t]) +
                   q * q * (double)__ldcg(&sums.dr_dr);
  const double deviation = sqrt(u > 0.0 ? u : 0.0);
  constexpr double kLog = 25.0;  // l in the derivation
  const double margin =
      is_bracket ? a.brackets.width * (sqrt(2.0 * kLog) * deviation + 8.0 / 3.0 * kLine * kLog)
                 : 3.0 * deviation + kLine;
  if (is_bracket && view.pivot != kNoKey) {  // is that surely the threshold?
    const double below = (double)__ldcg(&sums.below_pivot[t]) - q * ranked;
    const double upto = below + (double)__ldcg(&sums.at_pivot[t]);
    if (below < -1.0 - margin && upto > margin) {
      return {{view.pivot, 0, 0, false}, view.pivot, 0.0};
    }
  }
  // Ranks in the window, of its first bin to log, of the estimate, and of the last bin to log.
  const double rank = q * ranked - (double)__ldcg(&sums.below_window[t]);
  const double ranks[3] = {ceil(rank - margin - 1.0), ceil(rank), floor(rank + margin) + 1.0};
  const uint32_t last_bin = window.width >> window.shift;
  Bin found[3];
  double total = 0.0;
#pragma unroll
  for (int e = 0; e < 3; ++e) {
    const double wanted = ranks[e] < 1.0 ? 1.0 : ranks[e] < 1e9 ? ranks[e] : 1e9;
    total = (double)find_bin<kBins>(bins, (Count)wanted, found[e]);
    if (wanted > total) found[e] = {last_bin, (Count)total, 0};
  }
  const bool is_lowest = ranks[0]<1.0, is_highest = ranks[2]> total;
  if (is_lowest) found[0] = {0, 0, 0};
  const bool is_open =
      (is_lowest && window.low > 0) || (is_highest && window.low + window.width < kInfinityBits);
  const auto end_of = [&](const Bin& bin) {
    const uint32_t width = ((bin.index + 1) << window.shift) - 1;
    return window.low + (width < window.width ? width : window.width);
  };
  Plan plan = {{window.low + (found[0].index << window.shift), 0, 0, true},
               end_of(found[1]),
               is_open ? HUGE_VAL : (double)(found[2].below + found[2].inside - found[0].below)};
  plan.window.width = end_of(found[2]) - plan.window.low;
#pragma unroll 1
  while (plan.window.width >> plan.window.shift >= kBins) ++plan.window.shift;
  return plan;
}

// The windows of both thresholds, and the mode. For a whole block.
ROSE_DEVICE void make_plans(const SelectArguments& a, const View* views) {
  SelectState& state = *a.state;
  bool speculates = a.brackets.capacity > 0 && a.lines > 0;
#pragma unroll 1
  for (int attempt = speculates ? 0 : 1; attempt < 2; ++attempt) {
    const bool is_bracket = attempt == 0;
    double logged = 0.0;
#pragma unroll 1
    for (int t = 0; t < 2; ++t) {
      const Plan plan = plan_of(a, views[t], t, is_bracket);
      logged += plan.logged;
      if (threadIdx.x != 0) continue;
      state.windows[t] = plan.window;
      (t == 0 ? state.estimate.high : state.estimate.low) = (int32_t)plan.estimate;
    }
    // With room for the sample to be wrong.
    speculates = is_bracket && 1.25 * logged * (double)a.stratum <= (double)a.brackets.capacity;
    if (speculates) break;
  }
  if (threadIdx.x == 0) state.mode = speculates ? Mode::kSpeculative : Mode::kExact;
}

ROSE_DEVICE void clear_state(SelectState& state) {
  for (int i = (int)(blockIdx.x * kThreads + threadIdx.x); i < (int)(sizeof(state) / sizeof(uint32_t));
       i += (int)(gridDim.x * kThreads)) {
    ((uint32_t*)&state)[i] = 0;
  }
}

// For a whole grid. Two lines for each warp at a time, which are neighbours in the sample.
ROSE_DEVICE void take_sample(const SelectArguments& a) {
  constexpr int kSums = sizeof(SampleSums) / sizeof(Count);
  __shared__ uint32_t bins[2][kBins];
  __shared__ SampleSums of_block;
  __shared__ View views[2];
  const Factors factors = factors_of(a.risk);
  clear<2 * kBins>(bins[0]);
  clear<kSums>((Count*)&of_block);
  read_pilot(a, factors, views);
  const int64_t warps = (int64_t)gridDim.x * (kThreads / kWarp);
  const auto add = [&](Count& sum, int x) {
    if (lane() == 0 && x != 0) atomicAdd(&sum, (Count)(int64_t)x);
  };
#pragma unroll 1
  for (int64_t pair = (int64_t)blockIdx.x * (kThreads / kWarp) + warp(); 2 * pair < a.lines;
       pair += warps) {
    const uint32_t key = sampled_key(a, factors, 2 * pair + lane() / kLine, lane() % kLine);
    const auto difference = [](unsigned votes) {
      return __popc(votes & 0xFFFFu) - __popc(votes >> kLine);
    };
    const unsigned ranked = __ballot_sync(kFullWarp, key != kNoKey);
    const int dr = difference(ranked);
    add(of_block.ranked, __popc(ranked));
    add(of_block.dr_dr, dr * dr);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const View& view = views[t];
      if (view.window.low == kNoKey) continue;
      const uint32_t above = key - view.window.low;
      const int dc = difference(__ballot_sync(kFullWarp, key <= view.middle));
      add(of_block.dc_dc[t], dc * dc);
      add(of_block.dc_dr[t], dc * dr);
      add(of_block.below_window[t], __popc(__ballot_sync(kFullWarp, key < view.window.low)));
      add(of_block.below_pivot[t], __popc(__ballot_sync(kFullWarp, key < view.pivot)));
      add(of_block.at_pivot[t], __popc(__ballot_sync(kFullWarp, key == view.pivot)));
      if (key != kNoKey && key >= view.window.low && above <= view.window.width) {
        atomicAdd(&bins[t][above >> view.window.shift], 1u);
      }
    }
  }
  __syncthreads();
  Sample& sample = *a.sample;
  flush<2 * kBins>(bins[0], sample.bins[0]);
  flush<kSums>((const Count*)&of_block, (Count*)&sample.sums);
  if (!is_last_block(&sample.ticket)) return;
  make_plans(a, views);
  __syncthreads();
  clear<2 * kBins>(sample.bins[0]);
  clear<kSums>((Count*)&sample.sums);
  if (threadIdx.x == 0) sample.ticket = 0;
}

static __global__ void __launch_bounds__(kThreads, 4) sample_kernel(SelectArguments a) {
  clear_state(*a.state);
  take_sample(a);
}

// ---------------------------------------------------------------------------------------------- pass 1

// Appends the keys of a warp's lanes that `take`; false once the log is full.
ROSE_DEVICE bool append(bool take, uint32_t key, Count* size, uint32_t* log, int64_t capacity) {
  const unsigned takers = __ballot_sync(kFullWarp, take);
  if (takers == 0) return true;
  const int leader = __ffs((int)takers) - 1;
  Count at = 0;
  if (lane() == leader) at = atomicAdd(size, (Count)__popc(takers));
  const Count first = __shfl_sync(kFullWarp, at, leader);
  at = first + (Count)__popc(takers & ((1u << lane()) - 1));
  if (take && at < (Count)capacity) write<uint32_t>(log, (int64_t)at, key);
  return first < (Count)capacity;
}

// What a block counts in shared memory.
struct Counts {
  uint32_t histogram[kBins], of_windows[2][kBins];
  Count scratch[kThreads / kWarp];
  Window windows[2];
  Bounds estimate;
};

ROSE_DEVICE void count(const SelectArguments& a, Counts& shared) {
  constexpr int kShift = kKeyBits - 11;
  uint32_t* const histogram = shared.histogram;
  uint32_t (&of_windows)[2][kBins] = shared.of_windows;
  Count* const scratch = shared.scratch;
  SelectState& state = *a.state;
  clear<kBins>(histogram);
  clear<2 * kBins>(of_windows[0]);
  __syncthreads();
  const Window windows[2] = {state.windows[0], state.windows[1]};
  // A full log is of no use, and appending to it would cost an atomic for every key of a large class.
  bool room[2] = {windows[0].low != kNoKey, windows[1].low != kNoKey};
  unsigned below[2] = {0, 0}, inactive = 0, nonfinite = 0;  // of one thread
  for_each_key(a.risk, [&](uint32_t key) {
    if (key < kInactiveKey) atomicAdd(&histogram[key >> kShift], 1u);
    inactive += key == kInactiveKey;
    nonfinite += key == kNonfiniteKey;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint32_t above = key - windows[t].low;
      const bool inside = key >= windows[t].low && above <= windows[t].width && key != kNoKey;
      below[t] += key < windows[t].low;
      if (inside) atomicAdd(&of_windows[t][above >> windows[t].shift], 1u);
      if (room[t]) {
        room[t] = append(inside, key, &state.log_size[t], a.log + t * a.log_capacity, a.log_capacity);
      }
    }
  });
  __syncthreads();
  flush<kBins>(histogram, state.histogram);
  add_to(&state.inactive, inactive, scratch);
  add_to(&state.nonfinite, nonfinite, scratch);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    flush<kBins>(of_windows[t], state.of_windows[t]);
    add_to(&state.below_windows[t], below[t], scratch);
  }
  if (!is_last_block(&state.tickets[0])) return;

  Bin bin;
  const Count ranked = find_bin<kBins>(state.histogram, 0, bin);
  int64_t edges[2] = {-1, -1};
  Count upto[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Count rank = (Count)rank_of(t == 0 ? a.upper : a.lower, (int64_t)ranked);
    if (rank == 0) continue;
    find_bin<kBins>(state.histogram, rank, bin);
    const uint32_t edge = (bin.index + 1) << kShift;
    edges[t] = edge <= kInfinityBits ? edge - 1 : kInfinityBits;
    upto[t] = bin.below + bin.inside;
    Target target = {rank, bin.below, bin.inside, bin.index << kShift, kShift, true, false};
    __syncthreads();
    const Count below_window = __ldcg(&state.below_windows[t]);
    const Count in_window = find_bin<kBins>(state.of_windows[t], rank - below_window, bin);
    if (below_window < rank && rank <= below_window + in_window) {
      const Window window = state.windows[t];
      target = {rank,
                below_window + bin.below,
                bin.inside,
                window.low + (bin.index << window.shift),
                window.shift,
                true,
                __ldcg(&state.log_size[t]) <= (Count)a.log_capacity};
    }
    if (threadIdx.x == 0) state.targets[t] = target;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    state.ranked = ranked;
    if (a.approx) write_selection(a, edges[0], edges[1], upto[0], upto[1]);
  }
  __syncthreads();
  clear<2 * kBins>(state.of_windows[0]);
}

static __global__ void __launch_bounds__(kThreads, 4) count_kernel(SelectArguments a) {
  __shared__ Counts shared;
  count(a, shared);
}

// ---------------------------------------------------------------------------------- passes 2 and 3

template <bool kLast>
static __global__ void __launch_bounds__(kThreads, 4) narrow_kernel(SelectArguments a) {
  __shared__ uint32_t histogram[2][kBins];
  SelectState& state = *a.state;
  clear<2 * kBins>(histogram[0]);
  __syncthreads();
  uint32_t low[2], size[2];  // of the intervals to read from tensors
  int shift[2] = {0, 0};
  const auto count = [&](int t, uint32_t key, uint32_t from, uint32_t length) {
    if (key - from < length) atomicAdd(&histogram[t][(key - from) >> shift[t]], 1u);
  };
  bool counts = false;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Target& target = state.targets[t];
    const bool open = target.searching && target.bits > 0;
    counts = counts || open;
    low[t] = target.low;
    size[t] = open && !target.logged ? 1u << target.bits : 0;
    shift[t] = target.bits > 11 ? target.bits - 11 : 0;
    if (!open || !target.logged) continue;
    const int which = state.mode == Mode::kSpeculative ? 0 : t;  // of the logs
    const Count logged = state.log_size[which];
    const uint32_t length = 1u << target.bits;
    for (Count i = (Count)blockIdx.x * kThreads + threadIdx.x; i < logged;
         i += (Count)gridDim.x * kThreads) {
      const uint32_t word = read<uint32_t>(a.log + which * a.log_capacity, (int64_t)i);
      count(t, word & ~kInactiveKey, low[t], length);
    }
  }
  if (size[0] != 0 || size[1] != 0) {
    for_each_key(a.risk, [&](uint32_t key) {
#pragma unroll
      for (int t = 0; t < 2; ++t) count(t, key, low[t], size[t]);
    });
  }
  if (counts) {
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 2; ++t) flush<kBins>(histogram[t], state.of_windows[t]);
    if (!is_last_block(&state.tickets[kLast ? 2 : 1])) return;
#pragma unroll 1
    for (int t = 0; t < 2; ++t) {
      Target target = state.targets[t];
      if (!target.searching || target.bits == 0) continue;
      Bin bin;
      find_bin<kBins>(state.of_windows[t], target.rank - target.below, bin);
      const int bits = target.bits > 11 ? target.bits - 11 : 0;
      target.below += bin.below;
      target.inside = bin.inside;
      target.low += bin.index << bits;
      target.bits = bits;
      __syncthreads();
      if (threadIdx.x == 0) state.targets[t] = target;
    }
    __syncthreads();
    clear<2 * kBins>(state.of_windows[0]);
  } else if (blockIdx.x != 0) {
    return;
  }
  if (!kLast || threadIdx.x != 0) return;
  int64_t thresholds[2] = {-1, -1};
  Count upto[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Target& target = state.targets[t];
    if (!target.searching) continue;
    thresholds[t] = target.low;
    upto[t] = target.below + target.inside;
  }
  write_selection(a, thresholds[0], thresholds[1], upto[0], upto[1]);
}

}  // namespace cuda
}  // namespace rose
