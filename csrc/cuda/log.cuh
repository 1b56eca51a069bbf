// What a pass takes down about keys while it treats the elements: counts and a log; or nothing, where
// thresholds are known.
#pragma once

#include "sample.cuh"

namespace rose {
namespace cuda {

// For passes whose thresholds are known: only elements that are not finite are counted.
struct NoNotes {
  Bounds known;
  uint32_t* nonfinite;  // of the block, in shared memory; or null

  ROSE_METHOD Bounds bounds() const { return known; }
  ROSE_METHOD bool has_one_threshold() const { return known.low < 0; }
  template <bool kSecondOrder>
  ROSE_METHOD Judge<kSecondOrder> judge(float alpha, bool ranks_inactive) const {
    // -1 is above every key.
    return {fence_of<kSecondOrder>((uint32_t)known.high, (uint32_t)known.high),
            fence_of<kSecondOrder>((uint32_t)known.low, (uint32_t)known.low), alpha, ranks_inactive};
  }
  // Of a thread's elements that a comparison settled.
  ROSE_METHOD void count(const Verdict&) {}
  // Of an element of each of the lanes `takers` (this one among them) that was settled by its key:
  // old(p, m, v) are its numbers before the update.
  template <typename Old>
  ROSE_METHOD void add(unsigned, int, uint32_t key, bool, Old) {
    if (nonfinite != nullptr && key == kNonfiniteKey) atomicAdd(nonfinite, 1u);
  }
  // After it, by whole warps; and at the end of a run, whose first element has the place `base`.
  ROSE_METHOD void end_round(unsigned, int64_t) {}
  ROSE_METHOD void end_run(int64_t) {}
};

// Elements that wait until there are enough of them for a whole warp: a branch that only a few lanes
// take costs as much time as if all did.
struct Waiting {
  static constexpr int kMost = 2 * kWarp;  // fewer than a warp, and one of each lane
  uint32_t word[kMost];                    // of the log; kNoKey: nothing to note
  int element[kMost];                      // position in the run
  float p[kMost], m[kMost], v[kMost];
};

// The part of the log that a warp has reserved: `left` entries from `next` on are free.
struct Chunk {
  int64_t next;
  int left;
};

// What a block has in shared memory.
struct Counts {
  uint32_t of_windows[2][kBins];
  uint32_t counts[kCounts];
  Window windows[2];
  Bounds estimate;
  uint32_t lost;                   // entries without room in the log
  Chunk chunks[kThreads / kWarp];  // of each warp
  Waiting waiting[kThreads / kWarp];
};

// Adds a count of each thread to one of the block.
ROSE_DEVICE void add_to_block(uint32_t* count, unsigned x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_down_sync(kFullWarp, x, d);
  if (lane() == 0 && x != 0) atomicAdd(count, x);
}

// Counts, and a log of the elements whose risks are in the windows around the thresholds.
// `kOld`: with what they were before the update.
template <bool kOld>
class Logged {
 public:
  ROSE_METHOD Logged(const SelectArguments& a, Counts& shared) : a_(a), shared_(shared) {
    clear<2 * kBins>(shared.of_windows[0]);
    clear<kCounts>(shared.counts);
    if (threadIdx.x == 0) shared.estimate = a.state->estimate, shared.lost = 0;
    if (threadIdx.x < 2) shared.windows[threadIdx.x] = a.state->windows[threadIdx.x];
    if (lane() == 0) shared.chunks[warp()] = {0, 0};
    __syncthreads();
  }

  ROSE_METHOD Bounds bounds() const { return shared_.estimate; }
  ROSE_METHOD bool has_one_threshold() const { return shared_.windows[1].low > kInfinityBits; }
  template <bool kSecondOrder>
  ROSE_METHOD Judge<kSecondOrder> judge(float alpha, bool ranks_inactive) const {
    Fence fences[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const Window& window = shared_.windows[t];
      fences[t] = fence_of<kSecondOrder>(window.low, window.low + window.width);
    }
    return {fences[0], fences[1], alpha, ranks_inactive};
  }

  ROSE_METHOD void count(const Verdict& verdict) {
    const int lower = __popc(verdict.below_lower);
    below_[0] += (unsigned)(__popc(verdict.selected) - __popc(verdict.inactive) + lower);
    below_[1] += (unsigned)lower;
    if (verdict.inactive != 0)
      atomicAdd(&shared_.counts[kInactive], (unsigned)__popc(verdict.inactive));
  }

  template <typename Old>
  ROSE_METHOD void add(unsigned takers, int element, uint32_t key, bool is_selected, Old old) {
    Waiting& waiting = shared_.waiting[warp()];
    const int at = size_ + __popc(takers & lanes_below());
    if (key >= kInactiveKey) {
      atomicAdd(&shared_.counts[key == kInactiveKey ? kInactive : kNonfinite], 1u);
      waiting.word[at] = kNoKey;
      return;
    }
    waiting.word[at] = key | (uint32_t)is_selected << 31;
    waiting.element[at] = element;
    if (kOld) old(waiting.p[at], waiting.m[at], waiting.v[at]);
  }
  ROSE_METHOD void end_round(unsigned takers, int64_t base) {
    size_ += __popc(takers);
    if (size_ >= kWarp) note(base);
  }
  ROSE_METHOD void end_run(int64_t base) {
    if (size_ > 0) note(base);
  }

  // Adds all counts to those of the grid. For a whole block.
  ROSE_METHOD void finish() {
    __syncthreads();
    const Chunk chunk = shared_.chunks[warp()];
    if (lane() < chunk.left && chunk.next + lane() < a_.log.capacity) {
      write<uint32_t>(a_.log.keys, chunk.next + lane(), kNoKey);
    }
    add_to_block(&shared_.counts[kBelowUpper], below_[0]);
    add_to_block(&shared_.counts[kBelowLower], below_[1]);
    __syncthreads();
    if (threadIdx.x == 0 && shared_.lost != 0) atomicAdd(&a_.state->overflowed, 1u);
    flush<2 * kBins>(shared_.of_windows[0], a_.state->of_windows[0]);
    flush<kCounts>(shared_.counts, a_.state->counts);
  }

 private:
  static constexpr int kChunk = kWarp;  // entries that a warp takes of the log at a time

  // The last elements that wait, one for each lane.
  ROSE_METHOD void note(int64_t base) {
    const Waiting& waiting = shared_.waiting[warp()];
    __syncwarp();  // what the lanes wrote
    const int count = size_ < kWarp ? size_ : kWarp, i = size_ - count + lane();
    size_ -= count;
    const uint32_t word = lane() < count ? waiting.word[i] : kNoKey;
    const unsigned takers =
        __ballot_sync(kFullWarp, word != kNoKey && is_in_window(word & ~kInactiveKey));
    if (takers != 0) {
      // A full log is of no use: looking for room in it would only take long.
      const bool full = shared_.chunks[warp()].next >= a_.log.capacity;
      const int64_t at = full ? a_.log.capacity : reserve(takers);
      const bool is_taker = (takers >> lane() & 1u) != 0;
      if (is_taker && at >= a_.log.capacity) atomicAdd(&shared_.lost, 1u);
      if (is_taker && at < a_.log.capacity) {
        write<uint32_t>(a_.log.keys, at, word);
        if (a_.log.places != nullptr) write<int64_t>(a_.log.places, at, base + waiting.element[i]);
        if (kOld) {
          write<float>(a_.log.old, 3 * at, waiting.p[i]);
          write<float>(a_.log.old, 3 * at + 1, waiting.m[i]);
          write<float>(a_.log.old, 3 * at + 2, waiting.v[i]);
        }
      }
    }
    __syncwarp();
  }

  // Counts a key; whether it is to be logged.
  ROSE_METHOD bool is_in_window(uint32_t key) {
    bool is_logged = false;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const Window& window = shared_.windows[t];
      const uint32_t above = key - window.low;
      if (key < window.low) {
        ++below_[t];
      } else if (above <= window.width) {
        atomicAdd(&shared_.of_windows[t][above >> window.shift], 1u);
        is_logged = is_logged || window.logged;
      }
    }
    return is_logged;
  }

  // Where this lane's entry goes, if it is one of the takers.
  ROSE_METHOD int64_t reserve(unsigned takers) {
    Chunk& chunk = shared_.chunks[warp()];
    const int wanted = __popc(takers), before = __popc(takers & lanes_below());
    const int left = chunk.left;
    int64_t at = chunk.next + before, next = chunk.next + wanted;
    if (wanted > left) {  // the others come from the next chunk
      Count first = 0;
      if (lane() == 0) first = atomicAdd(&a_.state->log_size, (Count)kChunk);
      first = __shfl_sync(kFullWarp, first, 0);
      next = (int64_t)first + wanted - left;
      if (before >= left) at = (int64_t)first + before - left;
    }
    __syncwarp();
    if (lane() == 0) chunk = {next, wanted > left ? left - wanted + kChunk : left - wanted};
    __syncwarp();
    return at;
  }

  const SelectArguments& a_;
  Counts& shared_;
  unsigned below_[2] = {0, 0};
  int size_ = 0;  // of the warp's elements that wait
};

// Settles elements by their keys: those of a lane from `first` on whose bits are set. Fills in which
// are selected, and which not finite. key(j); old(j, p, m, v). By whole warps.
template <typename Notes, typename Key, typename Old>
ROSE_DEVICE void examine(unsigned unsure, int first, int64_t base, unsigned& selected,
                         unsigned& nonfinite, Notes& notes, Key key, Old old) {
#pragma unroll 1
  while (true) {
    const unsigned takers = __ballot_sync(kFullWarp, unsure != 0);
    if (takers == 0) return;
    if (unsure != 0) {
      const int j = __ffs((int)unsure) - 1;
      unsure &= unsure - 1;
      const uint32_t its_key = key(j);
      const bool is_selected = if_selected(its_key, notes.bounds(), 1) != 0;
      selected |= (unsigned)is_selected << j;
      nonfinite |= (unsigned)(its_key == kNonfiniteKey) << j;
      notes.add(takers, first + j, its_key, is_selected,
                [&](float& p, float& m, float& v) { old(j, p, m, v); });
    }
    notes.end_round(takers, base);
  }
}

}  // namespace cuda
}  // namespace rose
