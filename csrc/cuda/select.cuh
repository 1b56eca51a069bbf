// The k-th smallest of all risks, exactly, without storing them.
//
//   sample     a window around where each threshold seems to be
//   count      below each window and in its bins, and a log of the keys inside
//   histogram  (only if a threshold is not in its window) the leading 11 bits of all keys
//   narrow     twice: the next 11 bits, and the rest, of the log; or of all elements, if entries are missing
//
// A radix select, whose first digit is found by comparisons.
#pragma once

#include "log.cuh"

namespace rose {
namespace cuda {

ROSE_DEVICE void write_selection(const SelectArguments& a, int64_t high, int64_t low, Count upto_high,
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
  for (int i = 0; i < 8; ++i) a.selection[i] = record[i];
}

// Whether single gradients are multiplied by one factor at most, so that loops need not look at two:
// 1 changes nothing, and a product with -1 is not rounded.
ROSE_DEVICE bool is_one_factor(Factors factors) {
  return fabsf(factors.inv_scale) == 1.0f || factors.clip == 1.0f;
}

// The elements of this block's share are settled by comparisons, or by their keys. `sink`: what becomes of
// them (see Bits).
template <bool kSecondOrder, typename Notes, typename Sink>
ROSE_DEVICE void settle(const Risk& risk, Waiting* waiting, Notes& notes, Sink sink) {
  const Factors factors = factors_of(risk);
  const float factor = mul(factors.inv_scale, factors.clip);
  const bool is_usual = is_one_factor(factors) && notes.has_one_threshold();
  Queue queue(waiting);
  for_each_run(risk.table, [&](const Run& run) ROSE_ALWAYS_INLINE {
    const Segment& segment = risk.table.segments[run.segment];
    if (!segment.selective) return;
    const Judge<kSecondOrder> judge =
        notes.template judge<kSecondOrder>(segment.alpha, risk.rank_inactive);
    const auto by_key = [&](int i, float, bool is_there) ROSE_ALWAYS_INLINE {
      const int64_t at = run.begin + i;
      const uint32_t key = is_there ? key_at(risk, factors, segment, at) : kNoKey;
      const bool selected = if_selected(key, notes.bounds(), 1) != 0;
      const bool is_logged = is_there && notes.look(key);
      notes.log(is_logged, key | (uint32_t)selected << 31, segment.first_tile * kTile + at, 0, 0, 0);
      return is_there && selected;
    };
    const auto add = [&](int i, float v, bool is_there) ROSE_ALWAYS_INLINE {
      sink.add(segment, run.begin + i, by_key(i, v, is_there));
    };
    const int vectors = for_vectors(segment, is_usual, run.count, [&](auto types, int middle) ROSE_ALWAYS_INLINE {
      using Types = decltype(types);
      constexpr int kCount = Types::kCount;
      const Dtype of_g = types.of(1, segment.dtype[risk.operand]);
      const Dtype of_m = types.of(2, segment.dtype[risk.operand + 1]);
      const char* const g_data = data_from(segment, risk.operand, of_g, run.begin);
      const char* const m_data = data_from(segment, risk.operand + 1, of_m, run.begin);
#pragma unroll 1
      for (int i = threadIdx.x * kCount; i < middle; i += kThreads * kCount) {
        const auto raw_g = read_vector<kCount>(g_data, of_g, i);
        const auto raw_m = kSecondOrder ? read_vector<kCount>(m_data, of_m, i) : Raw<kCount>();
        const auto gradient = [&](int j) {
          const float g = get(raw_g, of_g, j);
          return Types::kIsUsual ? mul(g, factor) : factors.scaled(g);
        };
        const auto moment = [&](int j) { return kSecondOrder ? get(raw_m, of_m, j) : 0.0f; };
        Verdict verdict;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          judge.template judge<Types::kIsUsual>(gradient(j), moment(j), j, verdict);
        }
        if (__ballot_sync(kFullWarp, verdict.unsure != 0) != 0) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            const bool is_inactive = judge.is_inactive(gradient(j), moment(j));
            verdict.inactive |= (unsigned)is_inactive << j & verdict.unsure;
          }
          verdict.selected |= verdict.inactive;
          queue.add(verdict.unsure ^ verdict.inactive, i, [](int) { return 0.0f; });
        }
        notes.count(verdict);
        sink.write(segment, run.begin + i, verdict.selected, kCount);
        queue.drain(false, add);
      }
    });
    queue.drain(true, add);
#pragma unroll 1
    for (int base = vectors + warp() * kWarp; base < run.count; base += kThreads) {
      const int i = base + lane();
      const bool is_there = i < run.count;
      const bool selected = by_key(is_there ? i : 0, 0.0f, is_there);
      sink.write(segment, run.begin + i, selected, is_there ? 1 : 0);
    }
  });
}

template <typename Notes, typename Sink>
ROSE_DEVICE void settle(const Risk& risk, Waiting* waiting, Notes& notes, Sink sink) {
  if (risk.second_order) {
    settle<true>(risk, waiting, notes, sink);
  } else {
    settle<false>(risk, waiting, notes, sink);
  }
}

// Sinks. write(segment, position of the first, which are selected, how many) of each lane's elements that
// are neighbours; add(segment, position, is it selected) of others. By whole warps.
struct Nothing {
  ROSE_METHOD void write(const Segment&, int64_t, unsigned, int) const {}
  ROSE_METHOD void add(const Segment&, int64_t, bool) const {}
};
struct Bits {
  ROSE_METHOD void write(const Segment& segment, int64_t i, unsigned selected, int count) const {
    uint8_t* const bits = segment.bits;
    if (count == 8) {
      rose::cuda::write<uint8_t>(bits, i / 8, (uint8_t)selected);
    } else if (count == 4) {  // two lanes have a byte between them
      const unsigned next = __shfl_down_sync(kFullWarp, selected, 1);
      if (lane() % 2 == 0) rose::cuda::write<uint8_t>(bits, i / 8, (uint8_t)(selected | next << 4));
    } else {  // as many lanes as there are elements have one each
      const unsigned word = __ballot_sync(kFullWarp, selected != 0);
      const unsigned there = __ballot_sync(kFullWarp, count != 0);
      if (lane() % 8 == 0 && (there >> lane() & 1u) != 0) {
        rose::cuda::write<uint8_t>(bits, i / 8, (uint8_t)(word >> lane()));
      }
    }
  }
  // A bit of a byte that this warp has written. Lanes whose elements share a byte take turns.
  ROSE_METHOD void add(const Segment& segment, int64_t i, bool selected) const {
#pragma unroll 1
    for (int bit = 0; bit < 8; ++bit) {
      if (selected && i % 8 == bit) {
        const unsigned byte = read<uint8_t>(segment.bits, i / 8);
        rose::cuda::write<uint8_t>(segment.bits, i / 8, (uint8_t)(byte | 1u << bit));
      }
      __syncwarp();
    }
  }
};

// ---------------------------------------------------------------------------------------------- count

// For a whole grid.
ROSE_DEVICE void count(const SelectArguments& a, Counts& shared) {
  SelectState& state = *a.state;
  Logged notes(a, shared);
  settle(a.risk, shared.waiting, notes, Nothing());
  notes.finish();
  if (!is_last_block(&state.tickets[0])) return;
  const Count ranked = (Count)a.elements - __ldcg(&state.counts[kInactive]) - __ldcg(&state.counts[kNonfinite]);
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
      state.targets[t] = {rank, below + bin.below, bin.inside, window.low + (bin.index << window.shift),
                          window.shift, true, logged};
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
  constexpr int kShift = kKeyBits - 11;
  __shared__ uint32_t histogram[kBins], counts[kCounts];
  SelectState& state = *a.state;
  if (!a.approx && !state.unlucky) return;
  clear<kBins>(histogram);
  clear<kCounts>(counts);
  __syncthreads();
  for_each_key(a.risk, [&](uint32_t key) {
    if (key < kInactiveKey) {
      atomicAdd(&histogram[key >> kShift], 1u);
    } else {
      atomicAdd(&counts[key == kInactiveKey ? kInactive : kNonfinite], 1u);
    }
  });
  __syncthreads();
  flush<kBins>(histogram, state.histogram);
  if (a.approx) flush<kCounts>(counts, state.counts);  // they are known otherwise
  if (!is_last_block(&state.tickets[3])) return;
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
    if (threadIdx.x == 0) {
      state.targets[t] = {rank, bin.below, bin.inside, bin.index << kShift, kShift, true, false};
    }
  }
  if (threadIdx.x != 0) return;
  state.ranked = ranked;
  if (a.approx) write_selection(a, edges[0], edges[1], upto[0], upto[1]);
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
    const Target& target = state.targets[t];
    const bool open = target.searching && target.bits > 0;
    const uint32_t size = open ? 1u << target.bits : 0;
    low[t] = target.low;
    of_log[t] = target.logged ? size : 0;
    of_all[t] = target.logged ? 0 : size;
    counts[0] = counts[0] || of_log[t] != 0;
    counts[1] = counts[1] || of_all[t] != 0;
    shift[t] = target.bits > 11 ? target.bits - 11 : 0;
  }
  if (counts[0] || counts[1]) {
    clear<2 * kBins>(histogram[0]);
    __syncthreads();
    const auto count = [&](uint32_t key, const uint32_t(&size)[2]) {
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
    if (!kLast) clear<2 * kBins>(state.of_windows[0]);
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
