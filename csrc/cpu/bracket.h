// Selection and its use in one pass: what lies outside a bracket around the threshold is settled on the
// way. See rose_ops/reference.py, bracket_adamw_, for the brackets' width.
#pragma once

#include <functional>
#include <optional>

#include "select.h"

namespace rose {
namespace cpu {

struct BracketSettings {
  int64_t upper, lower;  // in units of 1e-9
  uint32_t draw;         // which sample
  double width;          // of brackets; else than 1 in tests, and then of little data, too
};

// What is done with the elements of a pass. Called by several threads, for different tiles.
struct BracketBody {
  // Treats elements [start, start + n) of segment `index` by `bounds`, and notes them if they are
  // ranked.
  virtual void tile(size_t index, int64_t start, int n, Bounds bounds, BracketLog& log,
                    UpdateCounts& counts) = 0;
  // Again for an element that was not treated as selected and is, or the other way round; returns what
  // that adds to the number of updated elements.
  virtual int redo(size_t index, int64_t element, const float* old, bool selected) = 0;
  virtual void prefetch(size_t index, int64_t element) const = 0;  // what redo() needs
  // Whether p, m and v are logged.
  virtual bool updates() const = 0;

 protected:
  ~BracketBody() = default;
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

// Walks `segments`, of which segment chosen[i] is segment i of `source`, and the others are not ranked.
// Null, and nothing was done, where a pass for select() and one for the body are better or necessary:
// little data, a large class of ties around the threshold, a log that could outgrow its share of
// memory.
std::optional<Selection> bracket_pass(const Segments& segments, const RiskSource& source,
                                      const std::vector<size_t>& chosen,
                                      const BracketSettings& settings, BracketBody& body,
                                      UpdateCounts& counts);

}  // namespace cpu
}  // namespace rose
