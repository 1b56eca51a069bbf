// The vector loops: each works on one tile, a run of at most kTile elements of one tensor, as float32
// in contiguous memory. tile.inl is compiled once per instruction set; `tile_kernels()` picks at run
// time, so one build runs on any CPU of its architecture.
#pragma once

#include <stdint.h>

#include "rose/element.h"

namespace rose {
namespace cpu {

constexpr int kTile = 1024;
constexpr int kLine = 16;             // elements of a cache line of float32
constexpr int kDigitBins = 2048 + 2;  // leading 11 bits of a 31-bit key; inactive; non-finite
constexpr int kDigitShift = 20;
constexpr int kHistogramCopies = 4;  // equal neighbours would wait for each other's store

// What keys are computed from; m is null for first order. g and m point to the tile's first element.
struct Risk {
  const float* g;
  const float* m;
  float alpha;
  bool rank_inactive;
};

struct ClassCounts {
  int64_t ranked = 0, inactive = 0, nonfinite = 0;
};

// One interval of keys, lo <= key <= hi. Keys equal to `pivot` are counted, not logged: a sampled
// threshold may sit on a large class of ties.
struct Window {
  uint32_t lo, hi, pivot;
};

// What is known of a window: keys below it, at its pivot, and the rest of its keys. `log` needs room
// for kTile + kLine more than are in it.
struct WindowLog {
  Window window;
  int64_t below = 0, at_pivot = 0;
  uint32_t* log = nullptr;
  int64_t logged = 0;
};

// Of one line's keys: how many are ranked, below a window, at or below its pivot, and inside it.
struct LineCounts {
  int ranked, below, upto_pivot, inside;
};

// A threshold that is known to lie in [low, high]: keys in there are logged, except those equal to
// `pivot`, which are counted (-1: none).
struct Bracket {
  int32_t low, high, pivot;
};

// What one pass notes while it treats elements by estimated thresholds: counts, and the keys in
// brackets (the sign bit says that the element was treated as selected) with what is needed to treat
// them again. The arrays need room for kTile more than are in them.
struct BracketLog {
  Bracket brackets[2];
  int count;
  int64_t below[2] = {}, at_pivot[2] = {}, inactive = 0, nonfinite = 0;
  uint32_t* keys = nullptr;
  int64_t* places = nullptr;
  float (*old)[4] = nullptr;  // p, m, v before the update, and g; null where none is updated
  int64_t logged = 0;
  int64_t place = 0;  // of the tile's first element
};

// The masks of one tensor. An element's kind is `base`, plus first_weight where first_bits has it, plus
// second_weight where second_bits has it or (with from_risk) its second-order risk is within bounds.
struct Masks {
  int32_t base = 0;
  const uint8_t* first_bits = nullptr;
  const uint8_t* second_bits = nullptr;
  int32_t first_weight = 0, second_weight = 0;
  bool from_risk = false;
  bool rank_inactive = false;
  float alpha = 0;
  float factors[2] = {1, 1};  // of the gradient, one after the other
  Bounds bounds{-1, -1};
  bool fractional = false;  // kinds 1 and 2 may occur
};

struct UpdateCounts {
  int64_t updated = 0, nonfinite = 0;
  int dense = 0;  // of a thread: blocks to go in which many risks are expected next to the threshold
};

struct TileKernels {
  const char* name;
  // Element i of a strided array to dst[i], or src[i] to it; bfloat16 and float16 narrow to nearest.
  void (*widen)(const void* src, Dtype dtype, int64_t stride, int n, float* dst);
  void (*narrow)(const float* src, Dtype dtype, int64_t stride, int n, void* dst);
  // bfloat16, rounded stochastically; `index` of the first element must not carry out of its lower 32
  // bits on the way to the last.
  void (*narrow_stochastic)(const float* src, int64_t stride, int n, void* dst, uint32_t key,
                            uint64_t index, Rounded what);
  // By two factors, one after the other.
  void (*scale)(const float* src, float first, float second, int n, float* dst);
  void (*keys)(const Risk& risk, int n, uint32_t* keys);
  // Counts of the leading digit into histogram[copy * kDigitBins + digit].
  void (*histogram)(const Risk& risk, int n, uint32_t* histogram);
  // Counts the classes, and what lies in each of `count` windows.
  void (*scan)(const Risk& risk, int n, ClassCounts& classes, WindowLog* windows, int count);
  // Keys whose bits from `shift` up equal `prefix`, to `out` (room for kTile + kLine); returns how
  // many.
  int (*filter)(const Risk& risk, int n, uint32_t prefix, int shift, uint32_t* out);
  // Counts n <= kLine keys, and puts those inside the window in `inside`, which has room for kLine.
  LineCounts (*count_line)(const uint32_t* keys, int n, const Window& window, uint32_t* inside);
  // Of n <= kTile logged keys: those that are in [low, low + span] but for their sign bits, to `out`
  // (room for n + kLine); the places of those whose sign bit is not what `bounds` say. Return how many.
  int (*logged_between)(const uint32_t* keys, int n, uint32_t low, uint32_t span, uint32_t* out);
  int (*logged_wrongly)(const uint32_t* keys, int n, Bounds bounds, int* places);
  // The mask, from bit 0 of bits[0] on; `log` may be null.
  void (*pack)(const Risk& risk, int n, Bounds bounds, uint8_t* bits, BracketLog* log);
  void (*adamw)(float* p, float* m, float* v, const float* g, int n, const Update& update);
  // Elements that are not finite count as kind 0; `log` may be null.
  void (*masked_adamw)(float* p, float* m, float* v, const float* g, const Masks& masks, int n,
                       const Update& update, UpdateCounts& counts, BracketLog* log);
  // Where nothing is selected: v alone changes.
  void (*decay)(const float* m, float* v, int n, const Update& update);
  double (*sum_of_squares)(const float* x, int n);
};

// The kernels for this CPU. ATEN_CPU_CAPABILITY=default|avx2|avx512, PyTorch's own variable, caps the
// choice.
const TileKernels& tile_kernels();

}  // namespace cpu
}  // namespace rose
