// A sample of the risks: where the thresholds are, and how sure that is.
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
  T bins[kOwn];
  Count own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) bins[i] = __ldcg(histogram + threadIdx.x * kOwn + i);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += bins[i];
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
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (below < rank && rank <= below + bins[i]) found = {threadIdx.x * kOwn + i, below, bins[i]};
    below += bins[i];
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

// Where a sample is looked at closely, from a pilot that every block reads: around its quantile, whose
// variance is measured there, and at a key that many elements have, if there is one.
struct View {
  Window window;
  uint32_t middle;  // the quantile
  uint32_t pivot;   // that key, or kNoKey
};

constexpr int kPilot = 2 * kThreads;  // keys

// Keys of an element each of lines that are drawn from their strata; kNoKey if it is not ranked or not
// there. First all places, then all loads, so that these overlap.
template <int kCount>
ROSE_DEVICE void sampled_keys(const SelectArguments& a, Factors factors,
                              const int64_t (&strata)[kCount], int element, uint32_t (&keys)[kCount]) {
  const Table& table = a.risk.table;
  const int operand = a.risk.operand;
  const Segment* segments[kCount];
  uint32_t g[kCount] = {}, m[kCount] = {};
  int64_t places[kCount][2];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    segments[k] = nullptr;
    const int64_t stratum = strata[k];
    const int64_t line = drawn_line(a.draw, stratum, a.strata.size);
    if (stratum >= a.strata.count || line >= table.lines) continue;
    const Segment& segment = table.segments[find_segment<&Segment::first_line>(table, line)];
    const int64_t i = (line - segment.first_line) * kLine + element;
    if (i >= segment.n) continue;
    segments[k] = &segment;
    locate(table.dims, segment, i, places[k], operand);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (segments[k] == nullptr) continue;
    g[k] = read_bits(segments[k]->data[operand], segments[k]->dtype[operand], places[k][0]);
    if (!a.risk.second_order) continue;
    m[k] = read_bits(segments[k]->data[operand + 1], segments[k]->dtype[operand + 1], places[k][1]);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    keys[k] = kNoKey;
    if (segments[k] == nullptr) continue;
    const float gradient = factors.scaled(from_bits(g[k], segments[k]->dtype[operand]));
    const float moment = from_bits(m[k], segments[k]->dtype[operand + 1]);
    const uint32_t key = key_of(a.risk, segments[k]->alpha, gradient, moment);
    if (key < kInactiveKey) keys[k] = key;
  }
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

// `keys`: sorted, of which `size` are ranked.
ROSE_DEVICE View view_of(const uint32_t* keys, int size, int64_t fraction) {
  const double q = (double)fraction * 1e-9, position = q * size;
  const double margin = window_margin(5.0, q, (double)size);
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
  const int64_t lines = a.strata.count;
  const int64_t apart = lines * kLine > kPilot ? lines / (kPilot / kLine) : 1;
  const int first = (int)threadIdx.x, second = first + kThreads;
  uint32_t drawn[2];
  sampled_keys<2>(a, factors, {first / kLine * apart, second / kLine * apart}, first % kLine, drawn);
  keys[first] = drawn[0], keys[second] = drawn[1];
  sort(keys);
  for (int i = threadIdx.x; i < kPilot; i += kThreads) {
    if (keys[i] != kNoKey && (i + 1 == kPilot || keys[i + 1] == kNoKey)) size = i + 1;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    const int64_t fraction = threadIdx.x == 0 ? a.upper : a.lower;
    views[threadIdx.x] = fraction > 0 ? view_of(keys, size, fraction) : no_view();
  }
  __syncthreads();
}

// What the sample says of a threshold.
struct Plan {
  Window window;
  uint32_t estimate;  // of the threshold, the last key of a bin; kNoKey if there is none
  double logged;      // keys to log, at most; infinite if the window does not hold the bracket
};

// A window is a few standard errors wide, and missing it costs time. A bracket must not be missed. For
// a whole block.
ROSE_DEVICE Plan plan_of(const SelectArguments& a, const View& view, int t, bool is_bracket) {
  const uint32_t* bins = a.sample->bins[t];
  const SampleSums& sums = a.sample->sums;
  const Window& window = view.window;
  if (window.low == kNoKey) return {window, kNoKey, 0.0};
  const double q = (double)(t == 0 ? a.upper : a.lower) * 1e-9;
  const double ranked = (double)__ldcg(&sums.ranked);
  const double u =
      squared_differences((double)(int64_t)__ldcg(&sums.dc_dc[t]),
                          (double)(int64_t)__ldcg(&sums.dc_dr[t]), (double)__ldcg(&sums.dr_dr), q);
  const double margin = is_bracket ? a.width * half_width(u, kLogOfFailure) : 3.0 * sqrt(u) + kLine;
  if (is_bracket && view.pivot != kNoKey) {  // is that surely the threshold?
    const double below = (double)__ldcg(&sums.below_pivot[t]) - q * ranked;
    const double upto = below + (double)__ldcg(&sums.at_pivot[t]);
    if (is_surely_between(below, upto, margin)) {
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
  Plan plan = {
      {window.low + (found[0].index << window.shift), 0, 0, true},
      end_of(found[1]),
      is_open ? HUGE_VAL
              : at_most((double)(found[2].below + found[2].inside - found[0].below), a.strata.size)};
  plan.window.width = end_of(found[2]) - plan.window.low;
#pragma unroll 1
  while (plan.window.width >> plan.window.shift >= kBins) ++plan.window.shift;
  return plan;
}

// The windows of both thresholds, and the course. For a whole block.
ROSE_DEVICE void make_plans(const SelectArguments& a, const View* views) {
  SelectState& state = *a.state;
  bool speculates = a.speculative && a.strata.count > 0;
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
    const double room = (double)(a.log.capacity - a.log.spare), all = (double)a.elements;
    if (logged < HUGE_VAL && logged > all) logged = all;
    speculates = is_bracket && logged <= room;
    if (speculates) break;
  }
  if (threadIdx.x == 0) state.course = speculates ? Course::kSpeculative : Course::kExact;
}

ROSE_DEVICE void clear_state(SelectState& state) {
  for (int i = (int)(blockIdx.x * kThreads + threadIdx.x); i < (int)(sizeof(state) / sizeof(uint32_t));
       i += (int)(gridDim.x * kThreads)) {
    ((uint32_t*)&state)[i] = 0;
  }
}

// For a whole grid. Two lines for each warp at a time, which are neighbours in the sample.
ROSE_DEVICE void take_sample(const SelectArguments& a) {
  constexpr int kSums = sizeof(SampleSums) / sizeof(Count), kAtOnce = 4;
  __shared__ uint32_t bins[2][kBins];
  __shared__ int of_block[kSums];  // in the order of SampleSums
  __shared__ View views[2];
  const Factors factors = factors_of(a.risk);
  clear<2 * kBins>(bins[0]);
  clear<kSums>(of_block);
  read_pilot(a, factors, views);
  const int64_t warps = (int64_t)gridDim.x * (kThreads / kWarp);
  int sums[kSums] = {};  // the same for all lanes of a warp
#pragma unroll 1
  for (int64_t pair = (int64_t)blockIdx.x * (kThreads / kWarp) + warp(); 2 * pair < a.strata.count;
       pair += kAtOnce * warps) {
    int64_t strata[kAtOnce];
    uint32_t keys[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) strata[k] = 2 * (pair + k * warps) + lane() / kLine;
    sampled_keys<kAtOnce>(a, factors, strata, lane() % kLine, keys);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const uint32_t key = keys[k];
      const auto votes = [](bool is) { return __ballot_sync(kFullWarp, is); };
      const auto difference = [](unsigned votes) {
        return __popc(votes & 0xFFFFu) - __popc(votes >> kLine);
      };
      const unsigned ranked = votes(key != kNoKey);
      const int dr = difference(ranked);
      sums[0] += __popc(ranked);
      sums[1] += dr * dr;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const View& view = views[t];
        if (view.window.low == kNoKey) continue;
        const uint32_t above = key - view.window.low;
        const int dc = difference(votes(key <= view.middle));
        sums[2 + t] += dc * dc;
        sums[4 + t] += dc * dr;
        sums[6 + t] += __popc(votes(key < view.window.low));
        sums[8 + t] += __popc(votes(key < view.pivot));
        sums[10 + t] += __popc(votes(key == view.pivot));
        if (key != kNoKey && key >= view.window.low && above <= view.window.width) {
          atomicAdd(&bins[t][above >> view.window.shift], 1u);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    if (lane() == 0 && sums[i] != 0) atomicAdd(&of_block[i], sums[i]);
  }
  __syncthreads();
  Sample& sample = *a.sample;
  flush<2 * kBins>(bins[0], sample.bins[0]);
  if (threadIdx.x < kSums) {
    atomicAdd((Count*)&sample.sums + threadIdx.x, (Count)(int64_t)of_block[threadIdx.x]);
  }
  if (!is_last_block(&sample.ticket)) return;
  make_plans(a, views);
  __syncthreads();
  clear<2 * kBins>(sample.bins[0]);
  clear<kSums>((Count*)&sample.sums);
  if (threadIdx.x == 0) sample.ticket = 0;
}

}  // namespace cuda
}  // namespace rose
