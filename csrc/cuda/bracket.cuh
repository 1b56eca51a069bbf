// A selection in the pass that it is for: elements are treated by an estimate of the threshold, those
// in a bracket around it are logged, and once the log has shown the threshold, those that were treated
// wrongly are done again. See step_ in rose_ops/reference.py.
//
//   sample   the estimate and the bracket, or that there is none
//   pass     treats, counts, logs           or counts and logs keys, as the first pass of a selection
//   narrow   twice, of a selection: the threshold, by the log
//   finish   what was treated wrongly       or treats all elements
//
// There is none (Course::kExact) where the sample leaves more inside than the log has room for. Should
// the log overflow all the same, the estimate stays the threshold, and is reported as a miss.
//
// With `approx`, the sample and narrow come first, as in select.cuh, and the pass is the end.
#pragma once

#include "update.cuh"

namespace rose {
namespace cuda {

// ------------------------------------------------------------------------------------------------ pass

// What is left to search for the `rank`-th smallest, in bits: none if the threshold is settled. For a
// whole block.
ROSE_DEVICE void resolve(const SelectArguments& a, int t, int64_t rank, Count* scratch) {
  SelectState& state = *a.state;
  const Window window = state.windows[t];
  const bool overflowed = __ldcg(&state.overflowed) != 0;
  const int64_t below = (int64_t)__ldcg(&state.counts[kBelowUpper + t]), in_window = rank - below;
  Bin bin;
  const int64_t inside =
      (int64_t)find_bin<kBins>(state.of_windows[t], (Count)(in_window < 1 ? 0 : in_window), bin);
  const bool missed = in_window < 1 || in_window > inside;
  Threshold threshold = {(Count)rank, (Count)below, 0, 0, 0, true, true};
  if (overflowed || !window.logged) {  // what the elements were treated by
    threshold.low = (uint32_t)(t == 0 ? state.estimate.high : state.estimate.low);
    const int last = (int)((threshold.low - window.low) >> window.shift);
    Count upto = 0;
    for (int i = threadIdx.x; i <= last; i += kThreads) upto += __ldcg(&state.of_windows[t][i]);
    threshold.inside = block_sum(upto, scratch);
  } else if (rank == 0 && below == 0) {
    threshold.searching = false;
  } else if (in_window < 1) {
    threshold.low = window.low - 1;
  } else if (in_window > inside) {
    threshold.low = window.low + window.width;
    threshold.inside = (Count)inside;
  } else {
    threshold = {(Count)rank,  (Count)below + bin.below,
                 bin.inside,   window.low + (bin.index << window.shift),
                 window.shift, true,
                 true};
  }
  if (threadIdx.x != 0) return;
  state.thresholds[t] = threshold;
  if (overflowed || (missed && threshold.searching)) state.missed = true;
}

// Ends a pass: the last block to come here finds the bins of the thresholds.
ROSE_DEVICE void resolve(const SelectArguments& a) {
  __shared__ Count scratch[kThreads / kWarp];
  SelectState& state = *a.state;
  if (a.approx) {
    end_approx(a);
    return;
  }
  if (!is_last_block(&state.tickets[0])) return;
  const Count ranked = ranked_of(a);
  if (threadIdx.x == 0) state.ranked = ranked;
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    const int64_t fraction = t == 0 ? a.upper : a.lower;
    if (fraction > 0) resolve(a, t, rank_of(fraction, (int64_t)ranked), scratch);
  }
  __syncthreads();
  clear<2 * kBins>(state.of_windows[0]);
}

// ---------------------------------------------------------------------------------------------- finish

// body(i, was it treated as selected) for the entries i of the log whose elements were not treated as
// they should have been.
template <typename Body>
ROSE_DEVICE void for_each_wrong(const SelectArguments& a, Bounds bounds, Body body) {
  const Count logged = a.state->log_size, capacity = (Count)a.log.capacity;
  const int64_t size = (int64_t)(logged < capacity ? logged : capacity);
  constexpr int kAtOnce = 4;
  const int64_t stride = (int64_t)gridDim.x * kThreads;
#pragma unroll 1
  for (int64_t first = (int64_t)blockIdx.x * kThreads + threadIdx.x; first < size;
       first += kAtOnce * stride) {
    uint32_t words[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = first + k * stride;
      words[k] = i < size ? read<uint32_t>(a.log.keys, i) : kNoKey;
    }
    unsigned wrong = 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool is_selected = if_selected(words[k] & ~kInactiveKey, bounds, 1) != 0;
      const bool is_wrong = words[k] != kNoKey && (words[k] >= kInactiveKey) != is_selected;
      wrong |= (unsigned)is_wrong << k;
    }
#pragma unroll 1
    for (; wrong != 0; wrong &= wrong - 1) {
      const int64_t i = first + (__ffs((int)wrong) - 1) * stride;
      body(i, read<uint32_t>(a.log.keys, i) >= kInactiveKey);
    }
  }
}

struct Place {
  int segment;
  int64_t element;
};

ROSE_DEVICE Place place_of(const Table& table, int64_t place) {
  const int index = find_segment(table, place / kTile);
  return {index, place - table.segments[index].first_tile * kTile};
}

template <bool kFractional>
ROSE_DEVICE void redo_updates(const StepArguments& step, Bounds bounds) {
  __shared__ uint32_t more, less;  // elements that are updated
  const UpdateArguments& a = step.update;
  const Log& log = step.select.log;
  if (threadIdx.x == 0) more = less = 0;
  __syncthreads();
  for_each_wrong(step.select, bounds, [&](int64_t i, bool was_selected) {
    const Place place = place_of(a.table, read<int64_t>(log.places, i));
    Updated u;
    u.fill(a, place.segment, NoNotes{{-1, -1}, nullptr});
    int64_t places[kOperands];
    locate(u.dims, *u.segment, place.element, places);
    const float g = u.gradient(u.load(1, places[1]));
    float p = read<float>(log.old, 3 * i), m = read<float>(log.old, 3 * i + 1);
    float v = read<float>(log.old, 3 * i + 2);
    const int rest = u.base_weight + ((u.mask_bits(0, place.element) & 1u) != 0 ? a.weights.first : 0);
    const int weight = rest + (was_selected ? 0 : a.weights.second);
    adamw_element<kFractional>(p, m, v, g, weight, u.update);
    u.store(0, place.element, places[0], p);
    u.store(2, place.element, places[2], m);
    u.store(3, place.element, places[3], v);
    if (rest == 0) atomicAdd(was_selected ? &less : &more, 1u);
  });
  __syncthreads();
  if (threadIdx.x == 0 && more != less) {
    atomicAdd(&a.counts[0], (Count)((int64_t)more - (int64_t)less));
  }
}

ROSE_DEVICE void redo_bits(const SelectArguments& a, Bounds bounds) {
  const Factors factors = factors_of(a.risk);
  for_each_wrong(a, bounds, [&](int64_t i, bool) {
    // The whole byte, anew: whoever else has an entry for it writes the same.
    const Place at = place_of(a.risk.table, read<int64_t>(a.log.places, i));
    const Segment& segment = a.risk.table.segments[at.segment];
    const int64_t first = at.element / 8 * 8;
    unsigned byte = 0;
#pragma unroll 1
    for (int j = 0; j < 8 && first + j < segment.n; ++j) {
      const uint32_t key = key_at(a.risk, factors, segment, first + j);
      byte |= (unsigned)if_selected(key, bounds, 1) << j;
    }
    write<uint8_t>(segment.bits, at.element / 8, (uint8_t)byte);
  });
}

// --------------------------------------------------------------------------------------------- kernels

static __global__ void __launch_bounds__(kThreads, 3) step_sample_kernel(StepArguments a) {
  clear_state(*a.select.state);
  const int thread = (int)(blockIdx.x * kThreads + threadIdx.x);
  if (thread == 0) a.update.counts[0] = a.update.counts[1] = 0;
  if (is_set(a.update.found_inf)) return;  // Course::kNothing
  for (int i = thread; i < a.update.table.count; i += (int)gridDim.x * kThreads) prepare(a.update, i);
  sample(a.select);
}

template <bool kFractional>
static __global__ void __launch_bounds__(kThreads, kBlocks) step_pass_kernel(StepArguments a) {
  __shared__ Counts shared;
  const Course course = a.select.state->course;
  if (course == Course::kExact) count(a.select, shared);
  if (course != Course::kSpeculative) return;
  Logged<true> notes(a.select, shared);
  update_share<kFractional, true>(a.update, notes, shared.counts);
  notes.finish();
  flush_counts(a.update, shared.counts);
  resolve(a.select);
}

// Also the update by a record of any origin: then there is no state of a selection.
template <bool kFractional>
static __global__ void __launch_bounds__(kThreads, kBlocks) step_finish_kernel(StepArguments a) {
  if (is_set(a.update.found_inf)) return;
  const Course course = a.select.state == nullptr ? Course::kExact : a.select.state->course;
  if (course == Course::kSpeculative) redo_updates<kFractional>(a, read_bounds(a.select.record));
  if (course == Course::kExact) update<kFractional, true>(a.update);
}

static __global__ void __launch_bounds__(kThreads, 4) capture_pass_kernel(SelectArguments a) {
  __shared__ Counts shared;
  if (a.state->course == Course::kExact) {
    count(a, shared);
    return;
  }
  Logged<false> notes(a, shared);
  settle(a.risk, notes, Bits());
  notes.finish();
  resolve(a);
}

static __global__ void __launch_bounds__(kThreads, 4) capture_finish_kernel(SelectArguments a) {
  const Bounds bounds = read_bounds(a.record);
  if (a.state->course == Course::kSpeculative) {
    redo_bits(a, bounds);
    return;
  }
  NoNotes notes = {bounds, nullptr};
  settle(a.risk, notes, Bits());
}

}  // namespace cuda
}  // namespace rose
