// How CPU threads walk the tiles of the index space, and how a tile becomes contiguous float32.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../segments.h"
#include "tile.h"

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

// In parallel: make() once per thread's share of tiles [begin, end), then body(state, segment index,
// start, n) for its tiles in order, then done(state).
template <typename Make, typename Body, typename Done>
void for_each_tile(const Segments& segments, int64_t begin, int64_t end, Make make, Body body,
                   Done done) {
  constexpr int64_t kGrain = 32;  // tiles: below this, a second thread costs more than it saves
  torch::stable::parallel_for(begin, end, kGrain, [&](int64_t begin, int64_t end) {
    FpMode mode;
    auto state = make();
    size_t index = segments.find(begin);
    for (int64_t tile = begin; tile < end; ++tile) {
      while (index + 1 < segments.size() && segments[index + 1].first_tile <= tile) ++index;
      const int64_t start = (tile - segments[index].first_tile) * kTile;
      const int n = static_cast<int>(std::min<int64_t>(kTile, segments[index].n - start));
      if (n > 0) body(state, index, start, n);
    }
    done(state);
  });
}

template <typename Make, typename Body, typename Done>
void for_each_tile(const Segments& segments, Make make, Body body, Done done) {
  for_each_tile(segments, 0, segments.tiles(), make, body, done);
}

// Elements [start, start + n) of an operand as floats: in place if they are that already, else widened
// into `buffer`.
float* load(const Segment& segment, const Operand& operand, int64_t start, int n, float* buffer);

// The reverse, unless `values` is the operand's own memory.
void store(const Segment& segment, const Operand& operand, int64_t start, int n, const float* values);

// As store(), to bfloat16 by stochastic rounding; `index` is the global index of element `start`.
void store_stochastic(const Segment& segment, const Operand& operand, int64_t start, int n,
                      const float* values, uint32_t key, int64_t index, Rounded what);

}  // namespace cpu
}  // namespace rose
