// The k-th smallest of all risks, exactly: a radix select over keys that are recomputed from gradients
// and moments in every pass, never stored.
//
// Pass 1 counts the leading 11 bits of every key, pass 2 the next 11 of those that start as the
// threshold does, pass 3 the last 9. Pass 2 also logs the keys around where the threshold should be, if
// its bin is filled evenly. Where that holds (and wherever few keys are left), pass 3 reads the log and
// no tensor.
#pragma once

#include "keys.cuh"

namespace rose {
namespace cuda {

// Bin of a histogram that holds the `rank`-th smallest, from 1, and how many are in the bins before it;
// returns the sum of all bins. For a whole block.
struct Bin {
  Count index, below, inside;
};

template <int kCount>
ROSE_DEVICE Count find_bin(const Count* histogram, Count rank, Bin& bin) {
  constexpr int kOwn = kCount / kThreads;
  __shared__ Count of_warps[kThreads / kWarp];
  __shared__ Bin found;
  Count own = 0;
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
    for (int i = 0;; ++i) {
      const Count inside = __ldcg(histogram + threadIdx.x * kOwn + i);
      if (rank <= below + inside) {
        found = {threadIdx.x * (Count)kOwn + i, below, inside};
        break;
      }
      below += inside;
    }
  }
  __syncthreads();
  bin = found;
  __syncthreads();
  return total;
}

// Adds a block's counts to those of all blocks, once.
template <int kCount>
ROSE_DEVICE void flush(const uint32_t* block, Count* all) {
  for (int i = threadIdx.x; i < kCount; i += kThreads) {
    if (block[i] != 0) atomicAdd(all + i, (Count)block[i]);
  }
}

template <int kCount>
ROSE_DEVICE void clear(uint32_t* block) {
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

// ---------------------------------------------------------------------------------------------- pass 1

// Second digits [first, last] to log: where the rank lies if density varies linearly across its bin, as
// the bins beside it suggest, and around that as much as fills half of the log.
ROSE_DEVICE void plan_log(Target& target, const Count* histogram, int64_t capacity) {
  const double inside = (double)target.inside;
  if (inside <= (double)capacity) return;   // all of them
  const auto density = [&](uint32_t bin) {  // relative: a bin's width doubles every 8
    const Count count = bin < kBins ? __ldcg(histogram + bin) : 0;
    return (double)count * exp2(-(double)(bin / 8));
  };
  const uint32_t bin = target.prefix;
  double slope = (density(bin + 1) - density(bin == 0 ? 0 : bin - 1)) / (2.0 * density(bin));
  slope = slope > 1.0 ? 1.0 : slope < -1.0 ? -1.0 : slope;
  const double share = (double)target.rank / inside;
  const double position = (share + slope * share * (1.0 - share) / 2.0) * kBins;
  const double half = (double)capacity / 4.0 / inside * kBins;
  const double first = floor(position - half), last = position + half;
  target.first_logged = first < 0.0 ? 0 : (uint32_t)first;
  target.last_logged = last > kBins - 1 ? kBins - 1 : (uint32_t)last;
}

static __global__ void __launch_bounds__(kThreads, 4) count_kernel(SelectArguments a) {
  __shared__ uint32_t histogram[kBins];
  __shared__ Count scratch[kThreads / kWarp];
  SelectState& state = *a.state;
  clear<kBins>(histogram);
  __syncthreads();
  unsigned inactive = 0, nonfinite = 0;  // of one thread
  for_each_key(a.risk, [&](uint32_t key) {
    if (key < kInactiveKey) atomicAdd(&histogram[key >> kFirstShift], 1u);
    inactive += key == kInactiveKey;
    nonfinite += key == kNonfiniteKey;
  });
  __syncthreads();
  flush<kBins>(histogram, state.histogram[0]);
  add_to(&state.inactive, inactive, scratch);
  add_to(&state.nonfinite, nonfinite, scratch);
  if (!is_last_block(&state.tickets[0])) return;

  Bin bin;
  const Count ranked = find_bin<kBins>(state.histogram[0], 0, bin);
  if (threadIdx.x == 0) state.ranked = ranked;
  int64_t thresholds[2] = {-1, -1};
  Count upto[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Count rank = (Count)rank_of(t == 0 ? a.upper : a.lower, (int64_t)ranked);
    if (rank == 0) continue;
    find_bin<kBins>(state.histogram[0], rank, bin);
    if (threadIdx.x != 0) continue;
    const uint32_t edge = ((uint32_t)bin.index + 1) << kFirstShift;
    thresholds[t] = edge <= kInfinityBits ? edge - 1 : kInfinityBits;
    upto[t] = bin.below + bin.inside;
    Target target = {rank - bin.below, bin.below, bin.inside, (uint32_t)bin.index, 0,
                     kBins - 1,        true,      false};
    plan_log(target, state.histogram[0], a.log_capacity);
    state.targets[t] = target;
  }
  if (a.approx && threadIdx.x == 0) {
    write_selection(a, thresholds[0], thresholds[1], upto[0], upto[1]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) state.histogram[0][i] = 0;
}

// ---------------------------------------------------------------------------------------------- pass 2

// Appends the keys of a warp's lanes that `take`; false once the log is full.
ROSE_DEVICE bool append(bool take, uint32_t key, Count* size, uint32_t* log, int64_t capacity) {
  const unsigned takers = __ballot_sync(kFullWarp, take);
  if (takers == 0) return true;
  const int leader = __ffs((int)takers) - 1;
  Count at = 0;
  if (lane() == leader) at = atomicAdd(size, (Count)__popc(takers));
  at = __shfl_sync(kFullWarp, at, leader);
  at += (Count)__popc(takers & ((1u << lane()) - 1));
  if (take && at < (Count)capacity) write<uint32_t>(log, (int64_t)at, key);
  return __shfl_sync(kFullWarp, at, leader) < (Count)capacity;
}

static __global__ void __launch_bounds__(kThreads, 4) refine_kernel(SelectArguments a) {
  __shared__ uint32_t histogram[2][kBins];
  SelectState& state = *a.state;
  const Target targets[2] = {state.targets[0], state.targets[1]};
  if (!targets[0].searching && !targets[1].searching) return;
  clear<2 * kBins>(histogram[0]);
  __syncthreads();
  // A full log is of no use, and appending to it would cost an atomic for every key of a large class.
  bool room[2] = {true, true};
  for_each_key(a.risk, [&](uint32_t key) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const Target& target = targets[t];
      const bool inside = target.searching && key >> kFirstShift == target.prefix;
      const uint32_t digit = (key >> kSecondShift) % kBins;
      if (inside) atomicAdd(&histogram[t][digit], 1u);
      if (room[t]) {
        const bool take = inside && target.first_logged <= digit && digit <= target.last_logged;
        room[t] = append(take, key, &state.log_size[t], a.log + t * a.log_capacity, a.log_capacity);
      }
    }
  });
  __syncthreads();
#pragma unroll
  for (int t = 0; t < 2; ++t) flush<kBins>(histogram[t], state.histogram[t]);
  if (!is_last_block(&state.tickets[1])) return;

#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Target& target = targets[t];
    if (!target.searching) continue;
    Bin bin;
    find_bin<kBins>(state.histogram[t], target.rank, bin);
    if (threadIdx.x == 0) {
      const bool logged = target.first_logged <= bin.index && bin.index <= target.last_logged &&
                          __ldcg(&state.log_size[t]) <= (Count)a.log_capacity;
      state.targets[t] = {target.rank - bin.below,
                          target.below + bin.below,
                          bin.inside,
                          target.prefix * kBins + (uint32_t)bin.index,
                          0,
                          0,
                          true,
                          logged};
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) state.histogram[0][i] = 0;
}

// ---------------------------------------------------------------------------------------------- pass 3

static __global__ void __launch_bounds__(kThreads, 4) finish_kernel(SelectArguments a) {
  constexpr int kLastBins = 1 << kSecondShift;
  __shared__ uint32_t histogram[2][kLastBins];
  SelectState& state = *a.state;
  clear<2 * kLastBins>(histogram[0]);
  __syncthreads();
  const auto count = [&](int t, uint32_t key, uint32_t prefix) {
    if (key >> kSecondShift == prefix) atomicAdd(&histogram[t][key % kLastBins], 1u);
  };
  // A threshold whose keys are in the log needs no tensor: nothing has a prefix of 32 bits.
  uint32_t prefix[2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Target& target = state.targets[t];
    prefix[t] = target.searching && !target.logged ? target.prefix : kNoKey;
    if (!target.logged) continue;
    const Count size = state.log_size[t];
    for (Count i = (Count)blockIdx.x * kThreads + threadIdx.x; i < size;
         i += (Count)gridDim.x * kThreads) {
      count(t, read<uint32_t>(a.log + t * a.log_capacity, (int64_t)i), target.prefix);
    }
  }
  if (prefix[0] != kNoKey || prefix[1] != kNoKey) {
    for_each_key(a.risk, [&](uint32_t key) {
#pragma unroll
      for (int t = 0; t < 2; ++t) count(t, key, prefix[t]);
    });
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < 2; ++t) flush<kLastBins>(histogram[t], state.histogram[t]);
  if (!is_last_block(&state.tickets[2])) return;

  int64_t thresholds[2] = {-1, -1};
  Count upto[2] = {0, 0};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Target& target = state.targets[t];
    if (!target.searching) continue;
    Bin bin;
    find_bin<kLastBins>(state.histogram[t], target.rank, bin);
    thresholds[t] = (int64_t)target.prefix * kLastBins + (int64_t)bin.index;
    upto[t] = target.below + bin.below + bin.inside;
  }
  if (threadIdx.x == 0) write_selection(a, thresholds[0], thresholds[1], upto[0], upto[1]);
}

}  // namespace cuda
}  // namespace rose
