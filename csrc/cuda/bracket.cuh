// A selection in the pass that it is for: elements are treated by an estimate of the threshold, those
// in a bracket around it are logged, and once the log has shown the threshold, those that were treated
// wrongly are done again. See rose_ops/reference.py, bracket_adamw_.
//
//   sample   the estimate and the bracket, or that there is none
//   pass     treats, counts, logs           or counts and logs keys, as the first pass of a selection
//   narrow   twice, of a selection: the threshold, by the log
//   finish   what was treated wrongly       or treats all elements
//
// There is none (Mode::kExact) where the sample leaves more inside than the log has room for. Should
// the log overflow all the same, the estimate stays the threshold, and is reported as a miss.
#pragma once

#include "select.cuh"
#include "update.cuh"

namespace rose {
namespace cuda {

// ------------------------------------------------------------------------------------------------ pass

// Counts of a thread where they take no more than a register: in fields of one word in a tile, after it
// in shared memory.
template <int kFields>
class Tally {
 public:
  // Before a barrier.
  ROSE_METHOD explicit Tally(uint32_t* shared) : totals_(shared) { clear<kFields * kThreads>(shared); }
  ROSE_METHOD void count(int field, bool is) { word_ += (unsigned)is << field * kBits; }
  ROSE_METHOD void end_tile() {
#pragma unroll
    for (int field = 0; field < kFields; ++field) {
      (*this)[field] += word_ >> field * kBits & ((1u << kBits) - 1);
    }
    word_ = 0;
  }
  ROSE_METHOD uint32_t& operator[](int field) { return totals_[field * kThreads + this_thread()]; }

 private:
  static constexpr int kBits = 6;
  static_assert(kTile / kThreads < 1 << kBits, "a field holds all elements of a thread");
  static_assert(kFields * kBits <= 32, "a word holds all fields");
  uint32_t* totals_;
  unsigned word_ = 0;
};

// `kUpdates`: with what an update changes.
template <bool kUpdates>
class Logged {
 public:
  ROSE_METHOD Logged(const SelectArguments& a, Counts& shared)
      : counts(shared.histogram), a_(a), shared_(shared) {
    static_assert(kFields * kThreads <= kBins, "counts have the place of the histogram");
    clear<2 * kBins>(shared.of_windows[0]);
    if (threadIdx.x == 0) shared.estimate = a.state->estimate;
    if (threadIdx.x < 2) shared.windows[threadIdx.x] = a.state->windows[threadIdx.x];
    __syncthreads();
  }

  static constexpr bool kAny = true;
  // From kNonfinite on in the order of SelectState.
  enum { kInactive = kUpdateFields, kBelow, kFields = kBelow + 2 };
  Tally<kFields> counts;

  ROSE_METHOD bool look(uint32_t key) {
    bool logged = false;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const Window& window = shared_.windows[t];
      counts.count(kBelow + t, key < window.low);
      if (key >= window.low && key - window.low <= window.width && key != kNoKey) {
        atomicAdd(&shared_.of_windows[t][(key - window.low) >> window.shift], 1u);
        logged = logged || window.logged;
      }
    }
    counts.count(kInactive, key == kInactiveKey);
    return logged;
  }

  // In the order of places: the elements of a byte of a mask are neighbours in the log.
  template <int kCount>
  ROSE_METHOD int reserve(unsigned inside) {
    unsigned before = 0, total = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const unsigned votes = __ballot_sync(kFullWarp, (inside >> j & 1u) != 0);
      before += (unsigned)__popc(votes & lanes_below());
      total += (unsigned)__popc(votes);
    }
    if (total == 0) return 0;
    Count first = 0;
    if (lanes_below() == 0) first = atomicAdd(&a_.state->log_size[0], (Count)total);
    first = __shfl_sync(kFullWarp, first, 0);
    const Count at = first + before;
    return at < (Count)a_.brackets.capacity ? (int)at : a_.brackets.capacity;
  }

  template <int kCount, typename Entries>
  ROSE_METHOD void log(unsigned inside, int at, int64_t place, Entries entry_of) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if ((inside >> j & 1u) == 0) continue;
      if (at < a_.brackets.capacity) {
        const Entry entry = entry_of(j);
        const int32_t selected = if_selected(entry.key, shared_.estimate, 1);
        write<uint32_t>(a_.log, at, entry.key | (uint32_t)selected << 31);
        write<int64_t>(a_.brackets.places, at, place + j);
        if (kUpdates) {
          write<float>(a_.brackets.old, 3 * (int64_t)at, entry.p);
          write<float>(a_.brackets.old, 3 * (int64_t)at + 1, entry.m);
          write<float>(a_.brackets.old, 3 * (int64_t)at + 2, entry.v);
        }
      }
      ++at;
    }
  }

  // The last block to come here finds the bins of the thresholds.
  ROSE_METHOD void finish() {
    SelectState& state = *a_.state;
    __syncthreads();
#pragma unroll 1
    for (int field = 1; field < kFields; ++field) {
      add_to(&state.nonfinite + (field - 1), counts[field], shared_.scratch);
    }
    flush<2 * kBins>(shared_.of_windows[0], state.of_windows[0]);
    if (!is_last_block(&state.tickets[0])) return;
    const Count ranked =
        (Count)a_.brackets.elements - __ldcg(&state.inactive) - __ldcg(&state.nonfinite);
    if (threadIdx.x == 0) state.ranked = ranked;
    const bool overflow = __ldcg(&state.log_size[0]) > (Count)a_.brackets.capacity;
#pragma unroll 1
    for (int t = 0; t < 2; ++t) {
      const int64_t fraction = t == 0 ? a_.upper : a_.lower;
      if (fraction > 0) resolve(t, rank_of(fraction, (int64_t)ranked), overflow);
    }
    __syncthreads();
    clear<2 * kBins>(state.of_windows[0]);
  }

 private:
  // What is left to search for the `rank`-th smallest, in bits: none if the threshold is settled.
  ROSE_METHOD void resolve(int t, int64_t rank, bool overflow) {
    SelectState& state = *a_.state;
    const Window window = state.windows[t];
    const int64_t below = (int64_t)__ldcg(&state.below_windows[t]), in_window = rank - below;
    Bin bin;
    const int64_t inside =
        (int64_t)find_bin<kBins>(state.of_windows[t], (Count)(in_window < 1 ? 0 : in_window), bin);
    const bool missed = in_window < 1 || in_window > inside;
    Target target = {(Count)rank, (Count)below, 0, 0, 0, true, true};
    if (overflow || !window.logged) {  // what the elements were treated by
      target.low = (uint32_t)(t == 0 ? state.estimate.high : state.estimate.low);
      const int last = (int)((target.low - window.low) >> window.shift);
      Count upto = 0;
      for (int i = threadIdx.x; i <= last; i += kThreads) upto += __ldcg(&state.of_windows[t][i]);
      target.inside = block_sum(upto, shared_.scratch);
    } else if (rank == 0 && below == 0) {
      target.searching = false;
    } else if (in_window < 1) {
      target.low = window.low - 1;
    } else if (in_window > inside) {
      target.low = window.low + window.width;
      target.inside = (Count)inside;
    } else {
      target = {(Count)rank,  (Count)below + bin.below,
                bin.inside,   window.low + (bin.index << window.shift),
                window.shift, true,
                true};
    }
    if (threadIdx.x != 0) return;
    state.targets[t] = target;
    if (overflow || (missed && target.searching)) state.missed = true;
  }

  const SelectArguments& a_;
  Counts& shared_;
};

// ---------------------------------------------------------------------------------------------- finish

// body(i, size, is_wrong) for the entries i of the log, which has `size`, whose elements were not
// treated as they should have been.
template <typename Body>
ROSE_DEVICE void for_each_wrong(const SelectArguments& a, Bounds bounds, Body body) {
  const Count logged = a.state->log_size[0], capacity = (Count)a.brackets.capacity;
  const int64_t size = (int64_t)(logged < capacity ? logged : capacity);
  const auto selected = [&](uint32_t word) {
    return if_selected(word & ~kInactiveKey, bounds, 1) != 0;
  };
  const auto is_wrong = [&](int64_t i) {
    const uint32_t word = read<uint32_t>(a.log, i);
    return (word >= kInactiveKey) != selected(word);
  };
#pragma unroll 1
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < size;
       i += (int64_t)gridDim.x * kThreads) {
    if (is_wrong(i)) body(i, size, is_wrong);
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
ROSE_DEVICE void redo_updates(const StepArguments& step, Bounds bounds, Count* scratch) {
  const UpdateArguments& a = step.update;
  const Brackets& log = step.select.brackets;
  int updated = 0;
  for_each_wrong(step.select, bounds, [&](int64_t i, int64_t, auto) {
    const Place place = place_of(a.table, read<int64_t>(log.places, i));
    const Updated u = {a, a.table.segments[place.segment], a.prepared[place.segment]};
    int64_t places[kOperands];
    locate(a.table, u.segment, place.element, places);
    const float g = u.gradient(u.load(1, places[1]));
    float p = read<float>(log.old, 3 * i), m = read<float>(log.old, 3 * i + 1);
    float v = read<float>(log.old, 3 * i + 2);
    const int rest = u.captured_kind(u.mask_bits(0, place.element), 0);
    const bool was = read<uint32_t>(step.select.log, i) >= kInactiveKey;
    const int kind = rest + (was ? 0 : a.second_weight);
    adamw_element<kFractional>(p, m, v, g, kind, u.prepared.update);
    u.store(0, place.element, places[0], p);
    u.store(2, place.element, places[2], m);
    u.store(3, place.element, places[3], v);
    updated += (kind != 0) - (rest + (was ? a.second_weight : 0) != 0);
  });
  add_to(&a.counts[0], (Count)(int64_t)updated, scratch);
}

ROSE_DEVICE void redo_bits(const SelectArguments& a, Bounds bounds) {
  for_each_wrong(a, bounds, [&](int64_t i, int64_t size, auto is_wrong) {
    // The first of a byte does it for all of them.
    const int64_t place = read<int64_t>(a.brackets.places, i);
    const auto is_of_byte = [&](int64_t e) {
      return read<int64_t>(a.brackets.places, e) / 8 == place / 8;
    };
    for (int64_t e = i; e > 0 && is_of_byte(e - 1); --e) {
      if (is_wrong(e - 1)) return;
    }
    unsigned flips = 1u << (place % 8);
    for (int64_t e = i + 1; e < size && is_of_byte(e); ++e) {
      if (is_wrong(e)) flips |= 1u << (read<int64_t>(a.brackets.places, e) % 8);
    }
    const Place at = place_of(a.risk.table, place);
    uint8_t* const bits = a.risk.table.segments[at.segment].bits;
    const unsigned byte = read<uint8_t>(bits, at.element / 8);
    write<uint8_t>(bits, at.element / 8, (uint8_t)(byte ^ flips));
  });
}

// --------------------------------------------------------------------------------------------- kernels

static __global__ void __launch_bounds__(kThreads, 4) step_sample_kernel(StepArguments a) {
  clear_state(*a.select.state);
  const int thread = (int)(blockIdx.x * kThreads + threadIdx.x);
  if (thread == 0) a.update.counts[0] = a.update.counts[1] = 0;
  if (is_set(a.update.found_inf)) return;  // Mode::kNothing
  for (int i = thread; i < a.update.table.count; i += (int)gridDim.x * kThreads) prepare(a.update, i);
  take_sample(a.select);
}

template <bool kFractional>
static __global__ void __launch_bounds__(kThreads, 4) step_pass_kernel(StepArguments a) {
  __shared__ Counts shared;
  const SelectState& state = *a.select.state;
  if (state.mode == Mode::kExact) count(a.select, shared);
  if (state.mode != Mode::kSpeculative) return;
  Logged<true> notes(a.select, shared);
  update_tiles<kFractional>(a.update, shared.estimate, notes, shared.scratch);
  notes.finish();
}

template <bool kFractional>
static __global__ void __launch_bounds__(kThreads, 4) step_finish_kernel(StepArguments a) {
  __shared__ Count scratch[kThreads / kWarp];
  const Mode mode = a.select.state->mode;
  const Bounds bounds = read_bounds(a.select.selection);
  if (mode == Mode::kSpeculative) redo_updates<kFractional>(a, bounds, scratch);
  if (mode != Mode::kExact) return;
  NoNotes notes;
  update_tiles<kFractional>(a.update, bounds, notes, scratch);
}

static __global__ void __launch_bounds__(kThreads, 4) capture_pass_kernel(SelectArguments a) {
  __shared__ Counts shared;
  if (a.state->mode == Mode::kExact) {
    count(a, shared);
    return;
  }
  Logged<false> notes(a, shared);
  capture_tiles(a.risk, a.state->estimate, notes);
  notes.finish();
}

static __global__ void __launch_bounds__(kThreads, 4) capture_finish_kernel(SelectArguments a) {
  const Bounds bounds = read_bounds(a.selection);
  if (a.state->mode == Mode::kSpeculative) {
    redo_bits(a, bounds);
    return;
  }
  NoNotes notes;
  capture_tiles(a.risk, bounds, notes);
}

}  // namespace cuda
}  // namespace rose
