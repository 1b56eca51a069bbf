// How threads walk the index space, and how its elements become runs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../segments.h"
#include "loops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rose {
namespace cpu {

// The default floating-point mode (round to nearest, denormals kept) while it lives:
// torch.set_flush_denormal(True) in the calling thread must not change a mask.
class FpMode {
 public:
#if defined(__x86_64__)
  FpMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FpMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FpMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~FpMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// body(next) once in each of several threads: next() gives out 0, 1, ... count - 1, then -1, to whoever
// asks first. A thread that others keep from running holds up no more than what it has taken.
template <typename Body>
void share_out(int64_t count, Body body) {
  std::atomic<int64_t> taken{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    FpMode mode;
    body([&] {
      const int64_t next = taken.fetch_add(1, std::memory_order_relaxed);
      return next < count ? next : int64_t{-1};
    });
  });
}

// Tiles of the index space, some at a time: few enough that nobody waits long for who is last, enough
// that a second thread saves more than it costs. The same from any number of threads.
struct Chunks {
  int64_t tiles, size, count;

  explicit Chunks(int64_t tiles)
      : tiles(tiles),
        size(std::clamp<int64_t>(tiles / 128, 16, 64)),
        count((tiles + size - 1) / size) {}
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(tiles, (chunk + 1) * size); }
};

// Memory for runs of operands that are not contiguous.
struct Buffers {
  alignas(64) char data[4][kTile * sizeof(float)];
};

// fn(segment, first element, elements) for the runs of tiles [begin, end).
template <typename Fn>
void for_each_run(const Segments& segments, int64_t begin, int64_t end, Fn fn) {
  size_t index = segments.find(begin);
  while (begin < end) {
    while (index + 1 < segments.size() && segments[index + 1].first_tile <= begin) ++index;
    const Segment& segment = segments[index];
    const int64_t longest = segment.linear() ? kRun : kTile,
                  start = (begin - segment.first_tile) * kTile;
    const int64_t n = std::min({longest, segment.n - start, (end - begin) * kTile});
    if (n <= 0) return;
    fn(index, start, static_cast<int>(n));
    begin += (n + kTile - 1) / kTile;
  }
}

// Elements [start, start + n) of a segment, in place, or copied into buffers.
Run open_run(const Segment& segment, int64_t start, int n, Buffers& buffers);
// Where an element of an operand is.
char* place_of(const Segment& segment, const Operand& operand, int64_t element);
// Copies operand k back, if it was copied.
void write_back(const Segment& segment, int64_t start, const Run& run, size_t k);

}  // namespace cpu
}  // namespace rose
