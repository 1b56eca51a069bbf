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

// Bin of a histogram that holds the `rank`-th smallest, from 1, and how many are in the bins before it;
// returns the sum of all bins. For a whole block.
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
template <int kCount>
ROSE_DEVICE void flush(const uint32_t* block, Count* all) {
  for (int i = threadIdx.x; i < kCount; i += kThreads) {
    if (block[i] != 0) atomicAdd(all + i, (Count)block[i]);
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
                             0,
                             0};
#pragma unroll
  for (int i = 0; i < 8; ++i) a.selection[i] = record[i];
}

// ---------------------------------------------------------------------------------------------- sample

// The keys within three standard errors of the sample's quantile, if elements of a line are so alike
// that a line counts as a quarter of its elements (a design effect of 4). Whole bins of the sample, in
// case the threshold is one of many ties there; parts of bins, as if keys were spread evenly, where
// whole bins would fill the log. For a whole block.
ROSE_DEVICE Window plan_window(const Sample& sample, int64_t fraction, double share_of_log) {
  constexpr int kShift = kKeyBits - 14;
  constexpr double kWidth = 1 << kShift;
  Bin first = {0, 0, 0}, last = {kInfinityBits >> kShift, 0, 0};
  const Count total = find_bin<kSampleBins>(sample.histogram, 0, first);
  __syncthreads();
  const double q = (double)fraction * 1e-9, n = (double)total;
  const double margin = 3.0 * sqrt(4.0 * n * q * (1.0 - q)) + 1.0;
  const double from = floor(q * n - margin), upto = ceil(q * n + margin);
  const bool has_low = from >= 1.0, has_high = upto < n;
  if (has_low) find_bin<kSampleBins>(sample.histogram, (Count)from, first);
  __syncthreads();
  if (has_high) find_bin<kSampleBins>(sample.histogram, (Count)upto, last);
  uint32_t low = has_low ? first.index << kShift : 0;
  uint32_t high = has_high ? ((last.index + 1) << kShift) - 1 : kInfinityBits;
  const double below_high = has_high ? (double)(last.below + last.inside) : n;
  const double below_low = has_low ? (double)first.below : 0.0;
  if (below_high - below_low > 0.75 * share_of_log * n) {
    if (has_low)
      low += (uint32_t)((from - (double)first.below) / (double)first.inside * (kWidth - 1.0));
    if (has_high) high -= (uint32_t)((below_high - upto) / (double)last.inside * (kWidth - 1.0));
  }
  Window window = {low, high > low ? high - low : 0, 0};
#pragma unroll 1
  while (window.width >> window.shift >= kBins) ++window.shift;
  return window;
}

static __global__ void __launch_bounds__(kThreads, 4) sample_kernel(SelectArguments a) {
  const int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  const int64_t threads = (int64_t)gridDim.x * kThreads;
  for (int64_t i = thread; i < (int64_t)(sizeof(SelectState) / sizeof(uint32_t)); i += threads) {
    ((uint32_t*)a.state)[i] = 0;
  }
  const Table& table = a.risk.table;
  const Factors factors = factors_of(a.risk);
  for (int64_t line = thread / kWarp; line < a.lines; line += threads / kWarp) {
    // Positions are counted in whole tiles; a line beyond the end of its segment is not there.
    const uint64_t random = random_bits(0, (uint32_t)(line >> 32), (uint32_t)line);
    const int64_t at = line * a.stratum + (int64_t)(random * (uint64_t)a.stratum >> 32);
    const int64_t tile = at / kTile;
    const Segment& segment = table.segments[find_segment(table, tile)];
    const int64_t i = (tile - segment.first_tile) * kTile + at % kTile / kWarp * kWarp + lane();
    if (i >= segment.n) continue;
    const uint32_t key = key_at(a.risk, factors, segment, i);
    if (key < kInactiveKey) atomicAdd(&a.sample->histogram[key >> (kKeyBits - 14)], 1u);
  }
  if (!is_last_block(&a.sample->ticket)) return;
  SelectState& state = *a.state;
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    const int64_t fraction = t == 0 ? a.upper : a.lower;
    Window window = {kNoKey, 0, 0};  // no key is in it
    if (fraction > 0 && !a.approx) window = plan_window(*a.sample, fraction, a.share_of_log);
    if (threadIdx.x == 0) state.windows[t] = window;
    __syncthreads();
  }
  clear<kSampleBins>(a.sample->histogram);
  if (threadIdx.x == 0) a.sample->ticket = 0;
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

static __global__ void __launch_bounds__(kThreads, 4) count_kernel(SelectArguments a) {
  constexpr int kShift = kKeyBits - 11;
  __shared__ uint32_t histogram[kBins], of_windows[2][kBins];
  __shared__ Count scratch[kThreads / kWarp];
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

// ---------------------------------------------------------------------------------------- passes 2 and
// 3

template <bool kLast>
static __global__ void __launch_bounds__(kThreads, 4) narrow_kernel(SelectArguments a) {
  __shared__ uint32_t histogram[2][kBins];
  SelectState& state = *a.state;
  clear<2 * kBins>(histogram[0]);
  __syncthreads();
  uint32_t low[2], size[2];  // of the intervals to read from tensors
  int shift[2];
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
    const Count logged = state.log_size[t];
    const uint32_t length = 1u << target.bits;
    for (Count i = (Count)blockIdx.x * kThreads + threadIdx.x; i < logged;
         i += (Count)gridDim.x * kThreads) {
      count(t, read<uint32_t>(a.log + t * a.log_capacity, (int64_t)i), low[t], length);
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
