// One threshold on its way: what the sample says of it, what was counted so far, and the bracket that
// follows from both. See threshold.h for its width.
#pragma once

#include <array>
#include <vector>

#include "sample.h"

namespace rose {
namespace cpu {

constexpr int32_t kMaxKey = static_cast<int32_t>(kInfinityBits);

// What one thread counted, by phase: below the bracket, and inside it, by bins of the window.
struct Tally {
  static constexpr int kBins = 2048;
  int64_t below[kPhases] = {};
  uint32_t bins[kPhases][kBins] = {};
};

class Threshold {
 public:
  // `weight`: lines that a line of the sample stands for. `width`: that half-widths are multiplied by.
  // A bound fails with a probability of exp(-log_of_failure).
  Threshold(int64_t units, double weight, double width, double log_of_failure)
      : units_(units),
        fraction_(static_cast<double>(units) * 1e-9),
        weight_(weight),
        width_(width),
        log_of_failure_(log_of_failure) {}

  // From a first, small sample: where to look closely, from its quantiles at `errors` standard errors
  // (if elements of a line are as alike as 2 in 3) on each side. A window that does not hold the
  // bracket costs time only.
  Window find_window(std::vector<uint32_t>& keys, double errors);
  void set_sample(Sample&& sample);

  // Without a sample: the bracket is all there is, and stays so.
  void log_all() { fixed_ = true; }
  // The bracket before the pass; false if it reaches beyond the window.
  bool start();
  // Elements expected in the bracket, before the pass.
  double inside() const;
  // If the threshold is surely a key that many elements have, makes that all of the bracket.
  bool collapse();
  // Counts elements of the most frequent key of the bracket, instead of logging them; returns how many
  // are expected then in the rest of it.
  double set_pivot();
  // Of a phase, what one thread has counted.
  void count(int phase, const Tally& tally);
  // Tightens the bracket by what is known when all phases before `phase`, and `ranked` elements in
  // them, are counted.
  void tighten(int phase, int64_t ranked);

  Bracket bracket() const { return bracket_; }
  int32_t estimate() const { return estimate_; }
  bool collapsed() const { return fixed_ && bracket_.low == bracket_.high; }
  int bin(uint32_t key) const {
    return static_cast<int>((key - static_cast<uint32_t>(low_)) >> shift_);
  }
  int pivot_bin() const { return bin(static_cast<uint32_t>(bracket_.pivot)); }

  // The threshold's key, how many are at or below it, and whether it was missed.
  struct Found {
    int64_t key = -1, at_or_below = 0;
    bool missed = false;
  };
  // Of `ranked` elements, when all phases are counted; collect(low, span) returns the logged keys low
  // <= key <= low + span.
  template <typename Collect>
  Found find(int64_t ranked, int64_t at_pivot, Collect collect) const;

  // The k-th smallest key of the sample, from 1, if the window has it.
  std::optional<uint32_t> of_sample(int64_t k);

 private:
  typedef std::array<int64_t, Tally::kBins> Bins;

  void set_window(int32_t low, int32_t high);
  double margin(int phase) const;
  int32_t start_of(int bin) const { return low_ + (bin << shift_); }
  int32_t end_of(int bin) const {
    return static_cast<int32_t>(
        std::min<int64_t>(low_ + ((static_cast<int64_t>(bin) + 1) << shift_) - 1, high_));
  }
  // Estimated number of elements below the window, less the fraction of all that are ranked; phases
  // before `phase` are counted.
  double start_of_window(int phase, int64_t ranked) const;
  bool narrow(int phase, int64_t ranked);
  std::vector<uint32_t> sampled_keys() const;

  int64_t units_;
  double fraction_, weight_, width_, log_of_failure_;
  int32_t low_ = 0, high_ = kMaxKey, middle_ = kMaxKey;  // the window
  int shift_ = 21, first_bin_ = 0, last_bin_ = kMaxKey >> 21;
  Sample sample_;
  Bins to_come_{};     // of the sample, what lies in phases that are to come
  int64_t below_ = 0;  // counted
  Bins bins_{};
  Bracket bracket_{0, kMaxKey, -1};
  int32_t estimate_ = kMaxKey;
  bool fixed_ = false;  // the bracket
};

template <typename Collect>
Threshold::Found Threshold::find(int64_t ranked, int64_t at_pivot, Collect collect) const {
  const int64_t k = rank_of(units_, ranked);
  int64_t before = below_;
  for (int b = 0; b < first_bin_; ++b) before += bins_[static_cast<size_t>(b)];
  if (collapsed()) {  // nothing is logged: that key is the threshold, whatever comes out
    const int64_t upto = before + bins_[static_cast<size_t>(first_bin_)];
    return {bracket_.pivot, upto, k <= before || k > upto};
  }
  if (k == 0 && before == 0) return {};
  if (k <= before) return {int64_t{bracket_.low} - 1, before, true};
  for (int b = first_bin_; b <= last_bin_; ++b) {
    const int64_t inside = bins_[static_cast<size_t>(b)];
    if (k > before + inside) {
      before += inside;
      continue;
    }
    const auto low = static_cast<uint32_t>(std::max(start_of(b), bracket_.low));
    const auto high = static_cast<uint32_t>(std::min(end_of(b), bracket_.high));
    std::vector<uint32_t> keys = collect(low, high - low);
    int64_t at = k - before - 1;
    const auto pivot = static_cast<uint32_t>(bracket_.pivot);
    if (pivot >= low && pivot <= high) {
      // Those that another threshold's bracket has logged are counted already.
      keys.erase(std::remove(keys.begin(), keys.end(), pivot), keys.end());
      const int64_t under =
          std::count_if(keys.begin(), keys.end(), [=](uint32_t x) { return x < pivot; });
      if (at >= under && at < under + at_pivot) return {pivot, before + under + at_pivot, false};
      if (at >= under) {
        at -= at_pivot;
        before += at_pivot;
      }
    }
    std::nth_element(keys.begin(), keys.begin() + at, keys.end());
    const uint32_t key = keys[static_cast<size_t>(at)];
    return {key, before + std::count_if(keys.begin(), keys.end(), [=](uint32_t x) { return x <= key; }),
            false};
  }
  return {bracket_.high, before, true};
}

}  // namespace cpu
}  // namespace rose
