// What a pass over elements notes of their keys, besides treating them.
#pragma once

#include "sample.cuh"

namespace rose {
namespace cuda {

// Elements that comparisons left unsure wait, until there are enough of them for a whole warp: a few
// lanes that go a way of their own would take the time of all.
struct Waiting {
  static constexpr int kMost = kWarp + 8 * kWarp;  // fewer than a warp before, and all of a vector of 8
  int element[kMost];  // position in the run
  float v[kMost];      // second moment, which the update of a vector overwrites
};

// A warp's place in shared memory for them. All lanes hold the same.
class Queue {
 public:
  ROSE_METHOD explicit Queue(Waiting* of_block) : waiting_(of_block[warp()]) {}

  // Those of a lane's elements from `first` on whose bits are set; v(j): of element j. By whole warps.
  template <typename V>
  ROSE_METHOD void add(unsigned bits, int first, V v) {
    while (true) {
      const unsigned takers = __ballot_sync(kFullWarp, bits != 0);
      if (takers == 0) return;
      if (bits != 0) {
        const int j = __ffs((int)bits) - 1, at = size_ + __popc(takers & lanes_below());
        bits &= bits - 1;
        waiting_.element[at] = first + j;
        waiting_.v[at] = v(j);
      }
      size_ += __popc(takers);
    }
  }
  // treat(element, v, whether there is one) of a warp's worth of elements at a time; of the last few, too,
  // if `all`.
  template <typename Treat>
  ROSE_METHOD void drain(bool all, Treat treat) {
#pragma unroll 1
    while (size_ >= kWarp || (all && size_ > 0)) {
      __syncwarp();  // what the lanes wrote
      const int count = size_ < kWarp ? size_ : kWarp, at = size_ - count + lane();
      const bool is_there = lane() < count;
      treat(is_there ? waiting_.element[at] : 0, is_there ? waiting_.v[at] : 0.0f, is_there);
      size_ -= count;
      __syncwarp();
    }
  }

 private:
  Waiting& waiting_;
  int size_ = 0;
};

// ---------------------------------------------------------------------------------------------- notes

// Nothing but elements that are not finite: the thresholds are known.
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
  // Of an element by its key: whether it is to be logged.
  ROSE_METHOD bool look(uint32_t key) {
    if (nonfinite != nullptr && key == kNonfiniteKey) atomicAdd(nonfinite, 1u);
    return false;
  }
  // Of a thread's elements that a comparison settled.
  ROSE_METHOD void count(const Verdict&) {}
  // Writes an entry if `is_taken`. By whole warps.
  ROSE_METHOD void log(bool, uint32_t, int64_t, float, float, float) {}
};

// Entries of the log that a warp has taken: those from `next` on are free.
struct Chunk {
  int64_t next;
  int left;
};

// What a block has in shared memory: counts, and what is needed for few of the elements.
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

  ROSE_METHOD bool look(uint32_t key) {
    if (key >= kInactiveKey) {
      atomicAdd(&shared_.counts[key == kInactiveKey ? kInactive : kNonfinite], 1u);
      return false;
    }
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

  ROSE_METHOD void count(const Verdict& verdict) {
    const int lower = __popc(verdict.below_lower);
    below_[0] += (unsigned)(__popc(verdict.selected) - __popc(verdict.inactive) + lower);
    below_[1] += (unsigned)lower;
    if (verdict.inactive != 0) atomicAdd(&shared_.counts[kInactive], (unsigned)__popc(verdict.inactive));
  }

  ROSE_METHOD void log(bool is_taken, uint32_t word, int64_t place, float p, float m, float v) {
    const unsigned takers = __ballot_sync(kFullWarp, is_taken);
    if (takers == 0) return;
    // A full log is of no use: looking for room in it would only take long.
    const bool full = shared_.chunks[warp()].next >= a_.log.capacity;
    const int64_t at = full ? a_.log.capacity : reserve(takers);
    if (!is_taken) return;
    if (at >= a_.log.capacity) {
      atomicAdd(&shared_.lost, 1u);
      return;
    }
    write<uint32_t>(a_.log.keys, at, word);
    if (a_.log.places == nullptr) return;
    write<int64_t>(a_.log.places, at, place);
    if (a_.log.old == nullptr) return;
    write<float>(a_.log.old, 3 * at, p);
    write<float>(a_.log.old, 3 * at + 1, m);
    write<float>(a_.log.old, 3 * at + 2, v);
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
};

}  // namespace cuda
}  // namespace rose
