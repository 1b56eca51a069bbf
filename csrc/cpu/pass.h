// A ranking and its use in one pass over the data: what lies outside a bracket around the threshold is
// settled on the way, what lies inside is logged and settled afterwards.
//
// The elements are cut into chunks, which threads take one after the other. Chunks belong to
// phases: the first sixteenth of all chunks, the second one, and so on.
//
// A thread that finishes a chunk adds its counts to those of the chunk's phase. When a phase and all
// phases before it are counted, the bracket of the next phase follows from the counts, and from then on
// chunks are treated by that bracket, whichever thread found it. No thread waits for it: it is a part
// of the brackets before, so a chunk may be treated by an older one, too. A bracket depends only on
// what was counted and sampled, and not on which chunks were treated by which bracket. Therefore the
// brackets, the threshold, and even a miss are the same in every run, however many threads there are.
#pragma once

#include <optional>

#include "../arguments.h"
#include "thresholds.h"

namespace rose {
namespace cpu {

// What is done with the elements of a pass. Called by several threads, for different runs.
class Body {
 public:
  // Treats elements [start, start + n) of segment `index` by `stage`, and notes them if they are
  // ranked; `place` is that of the first one in the log.
  virtual void run(size_t index, int64_t start, int n, uint32_t place, const Stage& stage, Notes& notes,
                   UpdateCounts& counts) = 0;
  // Again for an element that was not treated as selected and is, or the other way round; returns what
  // that adds to the number of updated elements. `old`: p, m, v before, and g.
  virtual int redo(size_t index, int64_t element, const float* old, bool selected) = 0;
  virtual void prefetch(size_t index, int64_t element) const = 0;  // what redo() needs
  virtual void begin() {}  // before the first run; until then nothing is changed

  enum class Logs { kKeys, kPlaces, kOld };  // what redo() needs of the log; keys alone: nothing
  virtual Logs logs() const = 0;

 protected:
  ~Body() = default;
};

// A ranking: segment chosen[i] of the pass's segments is segment i of the source. Of a ranking that
// processes share, those that this one counts.
struct Ranked {
  const RiskSource& source;
  std::vector<size_t> chosen;
  int64_t upper, lower;  // in units of 1e-9
  uint32_t draw;         // which sample
  double width;          // of brackets; else than 1 in tests, and then of little data, too
  const Shared* shared;  // null: this process has all of it

  int64_t elements() const { return shared ? shared->elements : source.segments.elements(); }
};

// What became of a bracketed call, so that tests can tell that they test what they mean to.
struct BracketReport {
  int64_t one_pass = 0;   // 1: taken
  int64_t lines = 0;      // sampled
  int64_t logged = 0;     // elements
  int64_t redone = 0;     // elements
  int64_t collapsed = 0;  // thresholds whose bracket became one key
  // Brackets of the upper and of the lower threshold: ends before the pass, and in the end.
  int64_t first_low[2] = {-1, -1}, first_high[2] = {-1, -1};
  int64_t low[2] = {-1, -1}, high[2] = {-1, -1};
};

// Of the latest call by this thread.
BracketReport& latest_bracket();

// What is returned where processes share a ranking and have to find it in another way.
inline Selection nothing_done() {
  Selection none;
  none.misses = -1;
  return none;
}

// Walks `segments`, those that are not chosen too. Null, and nothing was done, where a pass that counts
// and one for the body are better or necessary: little data, a bracket around too much of it, processes
// that know of no earlier threshold. What processes do is the same on all of them. If one is lost after
// the pass, this raises, and elements are treated as an estimate of the threshold has it.
std::optional<Selection> bracket_pass(const Segments& segments, const Ranked& ranked, Body& body,
                                      UpdateCounts& counts);

// Walks `segments` with thresholds that are known; returns the selection with exact counts.
Selection given_pass(const Segments& segments, const std::vector<size_t>& chosen, Selection selection,
                     Body& body, UpdateCounts& counts);

}  // namespace cpu
}  // namespace rose
