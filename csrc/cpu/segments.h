// The flattened index space: each tensor (a parameter with its gradient and moments) is a segment, each
// segment a run of tiles. Work is divided over tiles, not tensors, and the tiles of a segment do not
// depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rose {
namespace cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// One tensor of a segment. `strides` are those of Segment::sizes; linear: none are needed.
struct Operand {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  bool linear = true;
  std::vector<int64_t> strides;

  int64_t element_size() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
};

struct Segment {
  int64_t n = 0;
  int64_t first_tile = 0;
  std::vector<int64_t> sizes;  // collapsed; empty if every operand is linear
  std::vector<Operand> operands;
};

// A list of tensors that makes up one operand of every segment.
struct Role {
  const char* name;
  const std::vector<Tensor>* tensors;
  bool written;
};

class Segments {
 public:
  explicit Segments(const std::vector<Role>& roles);

  size_t size() const { return segments_.size(); }
  int64_t tiles() const { return tiles_; }
  int64_t elements() const { return elements_; }
  const Segment& operator[](size_t i) const { return segments_[i]; }

  // Segment that holds a tile.
  size_t find(int64_t tile) const {
    auto after = std::upper_bound(segments_.begin(), segments_.end(), tile,
                                  [](int64_t t, const Segment& s) { return t < s.first_tile; });
    return static_cast<size_t>(after - segments_.begin()) - 1;
  }

  // In parallel: make() once per thread's share, then body(state, segment index, start, n) for its
  // tiles in order, then done(state).
  template <typename Make, typename Body, typename Done>
  void for_each_tile(Make make, Body body, Done done) const {
    constexpr int64_t kGrain = 32;  // tiles: below this, a second thread costs more than it saves
    torch::stable::parallel_for(0, tiles_, kGrain, [&](int64_t begin, int64_t end) {
      FpMode mode;
      auto state = make();
      size_t index = find(begin);
      for (int64_t tile = begin; tile < end; ++tile) {
        while (index + 1 < segments_.size() && segments_[index + 1].first_tile <= tile) ++index;
        const int64_t start = (tile - segments_[index].first_tile) * kTile;
        const int n = static_cast<int>(std::min<int64_t>(kTile, segments_[index].n - start));
        if (n > 0) body(state, index, start, n);
      }
      done(state);
    });
  }

 private:
  std::vector<Segment> segments_;
  int64_t tiles_ = 0, elements_ = 0;
};

// Elements [start, start + n) of an operand as floats: in place if they are that already, else widened
// into `buffer`.
float* load(const Segment& segment, const Operand& operand, int64_t start, int n, float* buffer);

// The reverse, unless `values` is the operand's own memory.
void store(const Segment& segment, const Operand& operand, int64_t start, int n, const float* values);

// As store(), to bfloat16 by stochastic rounding; `index` is the global index of element `start`.
void store_stochastic(const Segment& segment, const Operand& operand, int64_t start, int n,
                      const float* values, uint32_t key, int64_t index);

}  // namespace cpu
}  // namespace rose
