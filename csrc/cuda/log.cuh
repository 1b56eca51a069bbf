// What a pass over elements notes of their keys, besides treating them.
#pragma once

#include "sample.cuh"

namespace rose {
namespace cuda {

// Nothing but elements that are not finite: the thresholds are known.
struct NoNotes {
  static constexpr bool kAny = false;
  Bounds known;
  uint32_t* nonfinite;  // of the block, in shared memory; or null

  ROSE_METHOD Bounds bounds() const { return known; }
  template <bool kSecondOrder>
  ROSE_METHOD Judge<kSecondOrder> judge(float alpha) const {
    // -1 is above every key.
    return {fence_of<kSecondOrder>((uint32_t)known.high, (uint32_t)known.high),
            fence_of<kSecondOrder>((uint32_t)known.low, (uint32_t)known.low), alpha};
  }
  // Of an element by its key: whether it is to be logged.
  ROSE_METHOD bool look(uint32_t key) {
    if (nonfinite != nullptr && key == kNonfiniteKey) atomicAdd(nonfinite, 1u);
    return false;
  }
  // Of a thread's elements that a comparison settled.
  ROSE_METHOD void count(const Verdict&) {}
  // Writes an entry if `is_taken`. By whole warps.
  template <typename Place, typename Old>
  ROSE_METHOD void log(bool, uint32_t, Place, Old) {}
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
  static constexpr bool kAny = true;

  ROSE_METHOD Logged(const SelectArguments& a, Counts& shared) : a_(a), shared_(shared) {
    clear<2 * kBins>(shared.of_windows[0]);
    clear<kCounts>(shared.counts);
    if (threadIdx.x == 0) shared.estimate = a.state->estimate, shared.lost = 0;
    if (threadIdx.x < 2) shared.windows[threadIdx.x] = a.state->windows[threadIdx.x];
    if (lane() == 0) shared.chunks[warp()] = {0, 0};
    __syncthreads();
  }

  ROSE_METHOD Bounds bounds() const { return shared_.estimate; }
  template <bool kSecondOrder>
  ROSE_METHOD Judge<kSecondOrder> judge(float alpha) const {
    Fence fences[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const Window& window = shared_.windows[t];
      fences[t] = fence_of<kSecondOrder>(window.low, window.low + window.width);
    }
    return {fences[0], fences[1], alpha};
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
    below_[0] += (unsigned)(__popc(verdict.selected) + lower);
    below_[1] += (unsigned)lower;
  }

  template <typename Place, typename Old>
  ROSE_METHOD void log(bool is_taken, uint32_t word, Place place, Old old) {
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
    write<int64_t>(a_.log.places, at, place());
    if (a_.log.old == nullptr) return;
    float pmv[3];
    old(pmv);
#pragma unroll
    for (int i = 0; i < 3; ++i) write<float>(a_.log.old, 3 * at + i, pmv[i]);
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
