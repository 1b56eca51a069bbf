// The vector loops: each works on one tile, a run of at most kTile elements of one tensor, as float32
// in contiguous memory. tile.inl is compiled once per instruction set; `tile_kernels()` picks at run
// time, so one build runs on any CPU of its architecture.
#pragma once

#include <stdint.h>

#include "rose/element.h"

namespace rose {
namespace cpu {

constexpr int kTile = 1024;
constexpr int kDigitBins = 2048 + 2;  // leading 11 bits of a 31-bit key; inactive; non-finite
constexpr int kDigitShift = 20;
constexpr int kHistogramCopies = 4;  // equal neighbours would wait for each other's store

enum class Dtype : uint8_t { kFloat32, kBFloat16, kFloat16 };

// One interval of keys, lo <= key <= hi. Keys equal to `pivot` are counted, not logged: a sampled
// threshold may sit on a large class of ties.
struct Window {
  uint32_t lo, hi, pivot;
};

struct WindowCounts {
  int64_t below = 0, at_pivot = 0;
};

struct ClassCounts {
  int64_t ranked = 0, inactive = 0, nonfinite = 0;
};

struct UpdateCounts {
  int64_t updated = 0, nonfinite = 0;
};

struct TileKernels {
  const char* name;
  // Element i of a strided array to or from dst[i] or src[i]; bfloat16 and float16 narrow to nearest.
  void (*widen)(const void* src, Dtype dtype, int64_t stride, int n, float* dst);
  void (*narrow)(const float* src, Dtype dtype, int64_t stride, int n, void* dst);
  // bfloat16, rounded stochastically; the tile's first element has index (high, low), which must not
  // carry out of the low word within the tile.
  void (*narrow_stochastic)(const float* src, int64_t stride, int n, void* dst, uint32_t key,
                            uint32_t index_high, uint32_t index_low);
  void (*scale)(const float* src, float factor, int n, float* dst);
  void (*first_order_keys)(const float* g, bool rank_inactive, int n, uint32_t* keys);
  void (*second_order_keys)(const float* g, const float* m, float alpha, bool rank_inactive, int n,
                            uint32_t* keys);
  // Counts of the leading digit into histogram[copy * kDigitBins + digit].
  void (*histogram)(const uint32_t* keys, int n, uint32_t* histogram);
  void (*count_classes)(const uint32_t* keys, int n, ClassCounts& counts);
  // Appends the keys inside the window (but for the pivot) to `log`, which has room for n + 16 more,
  // and returns how many.
  int (*window)(const uint32_t* keys, int n, Window window, WindowCounts& counts, uint32_t* log);
  // Keys whose bits above `shift` equal `prefix`, appended to `out`; returns how many.
  int (*filter)(const uint32_t* keys, int n, uint32_t prefix, int shift, uint32_t* out);
  void (*pack)(const uint32_t* keys, int n, Bounds bounds, uint8_t* bits);
  // kinds[i] += weight where the mask has element i (mask bit i, or a selected key).
  void (*kinds_from_bits)(const uint8_t* bits, int weight, int n, int32_t* kinds);
  void (*kinds_from_keys)(const uint32_t* keys, Bounds bounds, int weight, int n, int32_t* kinds);
  // Elements with a gradient or moment that is not finite become kind 0.
  void (*mask_nonfinite)(const float* g, const float* m, int n, int32_t* kinds, UpdateCounts& counts);
  void (*adamw)(float* p, float* m, float* v, const float* g, int n, const Update& update);
  // `fractional` if any kind may be 1 or 2.
  void (*masked_adamw)(float* p, float* m, float* v, const float* g, const int32_t* kinds,
                       bool fractional, int n, const Update& update);
  double (*sum_of_squares)(const float* x, int n);
};

// The kernels for this CPU. ATEN_CPU_CAPABILITY=default|avx2|avx512, PyTorch's own variable, caps the
// choice.
const TileKernels& tile_kernels();

}  // namespace cpu
}  // namespace rose
