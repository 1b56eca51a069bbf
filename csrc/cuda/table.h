// What a launch reads: a table of segments in device memory and arguments that point to it. Nothing
// here depends on PyTorch, so that the kernels compile in seconds, and for the host in tests.
#pragma once

#include <cstddef>

#include "rose/threshold.h"

namespace rose {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kTile = 4096;
constexpr int kOperands = 4;
#ifdef ROSE_BLOCKS
constexpr int kBlocks = ROSE_BLOCKS;
#else
constexpr int kBlocks = 3;  // of an update on a multiprocessor, so that a thread has 80 registers
#endif

// How a segment is accessed: as vectors of elements, whose dtypes (parameter and gradient; moments) a
// loop may be compiled for. 16 bytes at a time, but for bfloat16 next to float32, which comes in 8.
enum class Access : uint8_t {
  kSingle,         // one by one: strided, or not aligned
  kFloats,         // float32
  kNarrowMoments,  // float32; bfloat16
  kWideMoments,    // bfloat16; float32
  kNarrow,         // bfloat16, 8 elements at a time
  kMixed,          // other dtypes
};

// One tensor with all that belongs to it. Operands are (gradient, first moment) in a selection, and
// (parameter, gradient, first moment, second moment) in an update.
struct Segment {
  int64_t n, first_tile;
  int64_t first_line;  // of those that can be sampled; a segment that is not ranked has none
  int64_t offset;      // global index of element 0
  int64_t first_dim;   // of its `dims` in Table::dims
  int32_t dims;        // 0: every operand is linear
  int32_t group;
  float alpha, sign;
  char* data[kOperands];
  const uint8_t* masks[2];  // first, second order
  uint8_t* bits;            // of the mask to capture
  float* step;
  Dtype dtype[kOperands];
  MaskKind mask_kinds[2];  // kNone unless selective
  bool selective;          // in a selection: ranked
  Access access;
};

// One dimension of a segment that is not linear.
struct Dim {
  int64_t size;
  double inverse;  // 1 / size
  int64_t strides[kOperands];
};

// In device memory. The order of segments is that of the index space; empty ones have no tile.
struct Table {
  const Segment* segments;
  const Hyper* groups;
  const Dim* dims;
  int64_t tiles, lines;
  int32_t count;
  int32_t share;  // tiles of a block
};

// A counter is 64 bits wide wherever elements are counted.
using Count = unsigned long long;

constexpr int kBins = 2048;  // of a pass: an interval of keys shrinks by so much
constexpr int kKeyBits = 31;

// A threshold while it is looked for. It is the `rank`-th smallest key, and known to lie in [low, low +
// 2^bits), an interval with `inside` keys; `below` keys are less than `low`.
struct Threshold {
  Count rank, below, inside;
  uint32_t low;
  int32_t bits;
  bool searching;
  bool logged;  // the log holds all keys of the interval
};

// The keys [low, low + width], where a threshold seems to be, counted in bins of 2^shift keys.
struct Window {
  uint32_t low, width;
  int32_t shift;
  bool logged;  // or only counted
};

enum class Course : int32_t {
  kNothing,      // found_inf was set: nothing is done
  kExact,        // the thresholds are found first, and used in a second pass
  kSpeculative,  // one pass: elements are treated by an estimate, and those it got wrong once more
};

// What a pass counts: below the window of each threshold, and outside of the ranking.
enum { kBelowUpper, kBelowLower, kInactive, kNonfinite, kUpdated, kCounts };

// The workspace of a ranking. Where there are two of something, they are of the upper and the lower
// threshold.
struct SelectState {
  Count histogram[kBins];  // of the leading 11 bits of all keys
  Count of_windows[2][kBins];
  Count counts[kCounts];
  Count ranked;
  Count log_size;
  Window windows[2];
  Threshold thresholds[2];
  uint32_t tickets[4];
  Course course;
  Bounds estimate;
  uint32_t overflowed;  // not 0: the log was too short, and entries are missing
  bool unlucky;         // a threshold is outside of its window: all keys have to be looked at
  bool missed;
};

// What is counted of a sample. A line has r ranked elements, of which c are at or below the estimated
// threshold; dr and dc are the differences of these between neighbouring lines. See threshold.h.
struct SampleSums {
  Count ranked, dr_dr;
  Count dc_dc[2], dc_dr[2];
  Count below_window[2], below_pivot[2], at_pivot[2];
};
static_assert(sizeof(SampleSums) == 12 * sizeof(Count), "they are added up as an array of counts");

static_assert(offsetof(SampleSums, dr_dr) == 1 * sizeof(Count) &&
                  offsetof(SampleSums, dc_dc) == 2 * sizeof(Count) &&
                  offsetof(SampleSums, dc_dr) == 4 * sizeof(Count) &&
                  offsetof(SampleSums, below_window) == 6 * sizeof(Count) &&
                  offsetof(SampleSums, below_pivot) == 8 * sizeof(Count) &&
                  offsetof(SampleSums, at_pivot) == 10 * sizeof(Count),
              "they are added up by their numbers");

// Zero before and after every selection.
struct Sample {
  uint32_t bins[2][kBins];  // of the window
  SampleSums sums;
  uint32_t ticket;
};

// What keys are computed from.
struct Risk {
  Table table;
  const float* inv_scale;  // or null
  const float* clip;       // or null
  bool second_order, rank_inactive;
  int32_t operand;  // of the gradient; the first moment follows it
};

// The elements whose keys are in a window that is logged, in no order.
struct Log {
  int64_t capacity;  // entries
  int64_t spare;     // how many of them warps may leave unused
  uint32_t* keys;    // their sign bits say which were treated as selected; kNoKey: no entry
  int64_t* places;   // tile * kTile + position in it; or null
  float* old;        // p, m, v before the update; or null
};

struct SelectArguments {
  Risk risk;
  Sample* sample;
  Strata strata;  // that lines are drawn from; none: there is nothing to sample
  uint32_t draw;  // which lines are drawn
  SelectState* state;
  Log log;
  int64_t elements;  // of the ranking
  int64_t* record;   // what comes out
  int64_t upper, lower;
  double width;      // that half-widths are multiplied by; 1 but in tests
  bool speculative;  // Course::kSpeculative is allowed
  bool approx;       // the sample's thresholds are taken for those of all elements
};

struct CaptureArguments {
  Risk risk;
  const int64_t* known;  // a record, by whose thresholds masks are written
  int64_t* record;       // where it is copied to
};

// What all elements of a segment have in common in an update.
struct Prepared {
  Update update;
  float scale, clip;  // that gradients are multiplied by
  uint32_t random_key;
  int32_t base_weight;  // that masks add to
  bool ruled_out;       // nothing of the segment is selected, whatever its gradient
};

// The learning rates of up to so many groups, if they are on the host, are passed by value: a schedule
// changes them at every step, and often nothing else changes.
constexpr int kFewGroups = 16;

struct UpdateArguments {
  Table table;
  const double* lrs;       // of each group; or null: few_lrs
  const float* inv_scale;  // or null
  const float* clip;       // or null: of selective segments, and of others
  const float* found_inf;  // or null
  const int64_t* known;    // a record, by whose thresholds second-order masks are found; or null
  Prepared* prepared;      // workspace, one for each segment
  int64_t* record;         // a copy of it, or an empty one
  Count* counts;           // updated, nonfinite
  double gamma;
  MaskWeights weights;
  bool fractional;  // weights 1 and 2 may occur
  bool rank_inactive;
  bool stochastic;  // rounding of bfloat16 parameters
  uint32_t seed;
  double few_lrs[kFewGroups];
};

// A ranking and the update that it is for, in one pass.
struct StepArguments {
  SelectArguments select;
  UpdateArguments update;
};

struct SquaresArguments {
  Table table;
  const float* inv_scale;
  double* partial;  // workspace, one for each tile
  double* sums;
};

struct ClipArguments {
  const double* sums;  // of squares
  int64_t count;
  float max_norm;
  float* factors;  // norm, factor of selective tensors, of others
};

// A ranking of whole tensors by their norms.
struct TensorsArguments {
  const double* sums;          // of squares of gradients
  const double* exp_avg_sums;  // likewise of first moments, or null: first order
  const float* alphas;
  const float* clip;  // or null
  int64_t count;      // less than 2^32
  int64_t upper, lower;
  bool rank_inactive;
  uint32_t* keys;  // workspace
  bool* mask;
  int64_t* record;
};

}  // namespace cuda
}  // namespace rose
