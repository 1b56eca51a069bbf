// A sample of the risks: it says between which keys the thresholds are, and how sure that is.
//
// Every block reads the same small part of the sample first, the pilot, which says where to look
// closely: a view of each threshold. Then the blocks share the whole sample, and count its keys in bins
// of those views. The last block to finish decides from the sums: a plan for each threshold, and the
// course.
#pragma once

#include "keys.cuh"

namespace rose {
namespace cuda {

// A bin of a histogram: how many elements are in the bins before it, and how many in it.
struct Bin {
  uint32_t index;
  Count below, inside;
};

// Sets `bin` to the bin of a histogram of kCount bins that holds the `rank`-th smallest element, from
// 1; to zeros if there are fewer elements, or if the rank is 0. Returns the sum of all bins. All
// threads of a block have to call it.
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

// Adds the counts that a block has in shared memory to those of all blocks, at its end.
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

// Where the sample is looked at closely for one threshold, as the pilot says.
struct View {
  Window window;    // some standard errors on each side of the pilot's quantile
  uint32_t middle;  // that quantile: at it, the variance of the sample is measured
  uint32_t pivot;   // a key near it that many elements have, or kNoKey
};

constexpr int kPilot = 2 * kThreads;  // keys of the pilot

// Sets keys[k] to the key of one element, number `element`, of the line that is drawn from stratum
// strata[k]; to kNoKey if it is not ranked, or if there is no such element. The loop is split: first
// all places are found, then all elements are loaded, so that the loads overlap.
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

// Sorts the pilot's keys in shared memory. It is a bitonic sort, in which every thread compares one
// pair in every step.
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

// The view of a threshold by the pilot: its `keys` are sorted, and the first `size` are of ranked
// elements. `fraction` is that of the threshold, in units of 1e-9.
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
  // If many elements have one key, there is a run of equal keys in the pilot: it is looked for from the
  // quantile outwards.
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

// The view of a threshold that is not asked for.
ROSE_DEVICE View no_view() { return {{kNoKey, 0, 0, false}, kNoKey, kNoKey}; }

// Draws the pilot, which is the same in every block, and makes the views of the upper and the lower
// threshold of it. All threads of a block have to call it; `views` are in shared memory.
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

// What is to be done about a threshold in the pass over all elements, as the sample says.
struct Plan {
  Window window;      // to count keys in, and to log those elements whose keys are in it
  uint32_t estimate;  // of the threshold: the last key of a bin; kNoKey if there is no threshold
  double logged;      // how many elements are logged, at most; infinite if the view's window does not
                      // hold the whole bracket, so that the plan is of no use
};

// The plan for threshold t (0: upper, 1: lower). If `is_bracket`, its window is a bracket: the
// threshold is in it except with a negligible probability, since elements outside are settled for good.
// Else the window is a few standard errors wide, and a threshold outside of it only costs time. All
// threads of a block have to call it.
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
  if (is_bracket && view.pivot != kNoKey) {  // if that surely is the threshold, nothing is logged
    const double below = (double)__ldcg(&sums.below_pivot[t]) - q * ranked;
    const double upto = below + (double)__ldcg(&sums.at_pivot[t]);
    if (is_surely_between(below, upto, margin)) {
      return {{view.pivot, 0, 0, false}, view.pivot, 0.0};
    }
  }
  // Ranks, counted from the start of the view's window: those of the first bin of the plan's window, of
  // the estimate, and of the last bin. `rank` is where the threshold seems to be in the sample.
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
  // The plan's window would have to begin before the view's, or to end behind it.
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

// Makes the plans for both thresholds, and decides on the course: one speculative pass with brackets,
// if what it would log fits into the log; else an exact ranking, with windows that are narrower (the
// second attempt). All threads of a block have to call it.
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

// Sets the workspace of a ranking to zero, by all threads of the grid.
ROSE_DEVICE void clear_state(SelectState& state) {
  for (int i = (int)(blockIdx.x * kThreads + threadIdx.x); i < (int)(sizeof(state) / sizeof(uint32_t));
       i += (int)(gridDim.x * kThreads)) {
    ((uint32_t*)&state)[i] = 0;
  }
}

// Takes the sample and decides what follows from it; see the top of this file. All threads of the grid
// have to call it. A warp takes two lines at a time, one with each half, which are neighbours in the
// sample: their differences say how large its variance is.
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
  int sums[kSums] = {};  // likewise, of this warp: all of its lanes have the same
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
