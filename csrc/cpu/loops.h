// The loops over elements. Each works on a run: consecutive elements of one tensor in contiguous
// memory, whatever their dtype. loops.inl is compiled once per instruction set; `loops()` picks at run
// time, so that one build runs on any CPU of its architecture.
#pragma once

#include <stdint.h>

#include "rose/threshold.h"

namespace rose {
namespace cpu {

constexpr int kTile = 1024;      // elements: starts of runs, and of what is summed by itself
constexpr int kRun = 4 * kTile;  // the longest run
constexpr int kMostLanes = 16;   // what a loop may write beyond the end of a log

// Keys low <= key <= high, in which a threshold lies. Keys equal to `pivot` (-1: none) are counted, not
// logged.
struct Bracket {
  int32_t low, high, pivot;
};

// What is known about the thresholds of a ranking at some time.
struct Stage {
  Bracket brackets[2] = {};
  int count = 1;             // of brackets: upper, lower
  Bounds bounds = {-1, -1};  // by which elements are treated
};

// What loops note of a ranking: what is below brackets and at pivots, or not ranked, and a log of what
// is inside. A key in the log has its sign bit set where the element was treated as selected. `places`
// are null where keys alone are logged, `old` (p, m, v before, and g) where nothing is updated. The
// arrays need room for kRun + kMostLanes more than are in them.
struct Notes {
  int64_t below[2] = {}, at_pivot[2] = {}, inactive = 0, nonfinite = 0;
  uint32_t *keys = nullptr, *places = nullptr;
  float* old[4] = {};
  int64_t logged = 0;
};

// Operands of a run, in the order of segments' roles: p, g, m, v for updates; g, m for rankings (no m
// in first order).
struct Run {
  char* data[4];
  Dtype dtypes[4];
  int n;
  float factors[2];  // of the gradient, one after the other
  uint32_t place;    // of its first element, for the log

  int item(int k) const { return dtypes[k] == Dtype::kFloat32 ? 4 : 2; }
};

// What makes keys of a run.
struct Risk {
  bool second_order, rank_inactive;
  float alpha;
};

// A captured mask of a run: bits, or one answer for all of it.
struct MaskOfRun {
  const uint8_t* bits = nullptr;
  bool all = false;
};

// How a run is updated.
struct Step {
  const Update* update;
  // Whether M is found by risk; else by `second`. An ensemble's M is fractional, and `first` counts,
  // too.
  bool ranked, fractional;
  MaskOfRun first, second;
  // Of bfloat16 second moments and (`stochastic`) parameters: see rounding_bits() in element.h. The
  // lower half of the first element's global index, and keys of its upper half and of the one after
  // that.
  bool stochastic;
  uint32_t random_index, random_keys[2];
};

struct UpdateCounts {
  int64_t updated = 0, nonfinite = 0;
};

// Lines of a sample, n <= kLine elements each, of one ranking's operands.
struct SampledLine {
  const char *g, *m;
  int n;
};

// One interval of keys, and one of them.
struct Window {
  uint32_t low, high, middle;
};

// Of one line's keys: how many are ranked, below a window, at or below its middle, and inside it.
struct LineCounts {
  uint8_t ranked, below, upto_middle, inside;
};

struct Loops {
  const char* name;
  // AdamW under the mask. Elements that are not finite have M = 0.
  void (*masked)(const Run& run, const Step& step, const Risk& risk, const Stage& stage, Notes& notes,
                 UpdateCounts& counts);
  void (*adamw)(const Run& run, const Step& step);
  void (*decay)(const Run& run, const Step& step);  // where nothing is selected: v alone changes
  // Notes a ranking, and writes its mask from bit 0 of bits[0] on, unless that is null.
  void (*rank)(const Run& run, const Risk& risk, const Stage& stage, uint8_t* bits, Notes& notes);
  // Counts digits, (key >> shift) & (bins - 1), of keys whose bits above them equal `prefix`; bins, a
  // power of two, is `counts`' length. Those that are not ranked are counted in the notes.
  void (*digits)(const Run& run, const Risk& risk, uint32_t prefix, int shift, int bins,
                 uint32_t* counts, Notes& notes);
  // Counts lines by `windows` windows each, and appends their keys inside to `inside`, which has room
  // for kLine + kMostLanes more for each line.
  void (*sample)(const SampledLine* lines, int n, const Run& like, const Risk& risk,
                 const Window* windows, int count, LineCounts* counts, uint32_t* const* inside);
  // Of n logged keys: those in [low, low + span] but for their sign bits, to `out` (room for n +
  // kMostLanes); places in the log of those whose sign bits are not what `bounds` say. Return how many.
  int (*logged_between)(const uint32_t* keys, int n, uint32_t low, uint32_t span, uint32_t* out);
  int (*logged_wrongly)(const uint32_t* keys, int n, Bounds bounds, uint32_t* places);
  // Of at most kTile elements, the same bits from every set of instructions.
  double (*sum_of_squares)(const char* x, Dtype dtype, int n, float factor);
};

// The loops for this CPU. ATEN_CPU_CAPABILITY=default|avx2|avx512, PyTorch's own variable, caps the
// choice.
const Loops& loops();

}  // namespace cpu
}  // namespace rose
