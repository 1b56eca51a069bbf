// What a launch reads: a table of segments in device memory and arguments that point to it. Nothing
// here depends on PyTorch, so that the kernels compile in seconds, and for the host in tests.
#pragma once

#include <cstddef>

#include "rose/element.h"

namespace rose {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kVector = 4;  // elements of a 16-byte access of float32
constexpr int kTile = 4096;
constexpr int kLine = 16;  // elements that are sampled together: a cache line of float32
constexpr int kOperands = 4;

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
  bool vector;             // linear, and aligned for accesses of kVector elements
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

// One threshold on its way: the `rank`-th smallest key, which is one of the `inside` keys from `low` on
// that are less than 2^bits above it; `below` keys are less than `low`.
struct Target {
  Count rank, below, inside;
  uint32_t low;
  int32_t bits;
  bool searching;
  bool logged;  // the log holds all keys of the interval
};

// Keys [low, low + width] around where a sample has the threshold, in bins of 2^shift.
struct Window {
  uint32_t low, width;
  int32_t shift;
  bool logged;  // or else counted only
};

enum class Mode : int32_t {
  kNothing,      // an infinity was found
  kExact,        // the threshold first, then what it is for
  kSpeculative,  // both at once: elements are treated by an estimate, and some of them again
};

// The workspace of a selection. Of two thresholds: upper, lower.
struct SelectState {
  Count histogram[kBins];  // of the leading 11 bits of all keys
  Count of_windows[2][kBins];
  Count nonfinite, inactive, below_windows[2];
  Count ranked;
  Count log_size[2];
  Window windows[2];
  Target targets[2];
  uint32_t tickets[3];
  Mode mode;
  Bounds estimate;
  bool missed;
};
// A bracketed pass has their counts in one array.
static_assert(offsetof(SelectState, inactive) == offsetof(SelectState, nonfinite) + sizeof(Count) &&
                  offsetof(SelectState, below_windows) ==
                      offsetof(SelectState, nonfinite) + 2 * sizeof(Count),
              "nonfinite, inactive and below_windows must be neighbours, in this order");

// Counts of a sample: c (at or below about the threshold) and r (ranked) are those of a line, dc and dr
// their differences between neighbouring lines.
struct SampleSums {
  Count ranked, dr_dr;
  Count dc_dc[2], dc_dr[2];
  Count below_window[2], below_pivot[2], at_pivot[2];
};
static_assert(sizeof(SampleSums) == 12 * sizeof(Count), "they are added up as an array of counts");

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

// What is logged of the elements of a bracket, besides their keys.
struct Brackets {
  int32_t capacity;  // 0: there are no brackets
  int64_t* places;   // tile * kTile + position in it
  float* old;        // p, m, v before the update, or null
  int64_t elements;  // of the ranking
  double width;      // of brackets; 1 unless in tests
};

struct SelectArguments {
  Risk risk;
  Sample* sample;
  int64_t lines, stratum;  // to sample: one line in each stratum of so many
  uint32_t draw;           // which of them
  SelectState* state;
  // Keys, [2][log_capacity]; in a bracketed pass [Brackets::capacity], with the sign for those that
  // were treated as selected.
  uint32_t* log;
  int64_t log_capacity;
  int64_t* selection;  // a record
  int64_t upper, lower;
  bool approx;
  Brackets brackets;
};

struct CaptureArguments {
  Risk risk;
  const int64_t* selection;
};

// What all elements of a segment have in common in an update.
struct Prepared {
  Update update;
  float scale, clip;  // that gradients are multiplied by
  uint32_t random_key;
  int32_t base_kind;  // that masks add to
  bool ruled_out;     // nothing of the segment is selected, whatever its gradient
};

// Of so many groups, learning rates that are on the host come by value: a schedule changes them in
// every step, and nothing else.
constexpr int kFewGroups = 16;

struct UpdateArguments {
  Table table;
  const double* lrs;         // of each group; or null: few_lrs
  const float* inv_scale;    // or null
  const float* clip;         // or null: of selective segments, and of others
  const float* found_inf;    // or null
  const int64_t* selection;  // if from_risk
  bool from_risk;            // the second-order mask is found on the way
  Prepared* prepared;        // workspace, one for each segment
  Count* counts;             // updated, nonfinite
  double gamma;
  int32_t first_weight, second_weight;  // what a mask adds to an element's kind
  bool fractional;                      // kinds 1 and 2 may occur
  bool rank_inactive;
  bool stochastic;  // rounding of bfloat16 parameters
  uint32_t seed;
  double few_lrs[kFewGroups];
};

// Of a bracketed selection with the update.
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

}  // namespace cuda
}  // namespace rose
