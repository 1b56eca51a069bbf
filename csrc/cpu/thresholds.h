// One threshold on its way: what the sample says of it, what was counted so far, and the bracket that
// follows from both. See threshold.h for its width.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "sample.h"

namespace rose {
namespace cpu {

constexpr int32_t kMaxKey = static_cast<int32_t>(kInfinityBits);

// What one thread counted, by phase: below the bracket, and inside it, by bins of the window.
struct Tally {
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
  // Of processes that share a ranking: an octave on each side of the threshold of an earlier step.
  Window window_around(int32_t key);
  void set_sample(Sample&& sample, const Profile* profile = nullptr);

  // Without a sample: the bracket is all there is, and stays so.
  void log_all() { fixed_ = true; }
  // The bracket before the pass; false if it reaches beyond the window.
  bool start();
  // Elements expected in the bracket, before the pass.
  double inside() const;
  // If the threshold is surely a key that many elements have, makes that all of the bracket. Processes
  // look at the middle of the window alone.
  bool collapse();
  bool collapse_onto_middle();
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
  bool collapsed() const { return fixed_ && bracket_.pivot >= 0 && bracket_.low == bracket_.high; }
  int bin(uint32_t key) const {
    return static_cast<int>((key - static_cast<uint32_t>(low_)) >> shift_);
  }
  int pivot_bin() const { return bin(static_cast<uint32_t>(bracket_.pivot)); }

  // What processes add up of a sample, which is of one phase then; from there on the bracket is fixed.
  template <typename Visit>
  void visit_sample(Visit visit) {
    PhaseSample& all = sample_[0];
    for (int64_t* number :
         {&all.ranked, &all.below, &all.rr, &profile_->under_middle, &profile_->at_middle}) {
      visit(*number);
    }
    for (int64_t& sum : profile_->cc) visit(sum);
    for (int64_t& sum : profile_->cr) visit(sum);
    for (int64_t& bin : to_come_) visit(bin);
  }
  // And of what they counted.
  template <typename Visit>
  void visit_counts(Visit visit) {
    visit(below_);
    for (int64_t& bin : bins_) visit(bin);
  }
  void fix() { fixed_ = true; }

  // The threshold's key, how many are at or below it, and whether it was missed.
  struct Found {
    int64_t key = -1, at_or_below = 0;
    bool missed = false;
  };
  // When all phases are counted: that, or (`span` >= 0) among which of the logged keys it is, low <=
  // key
  // <= low + span: the at-th smallest one, from 0; `before` elements have smaller ones.
  struct Place {
    Found found;
    int64_t span = -1, at = 0, before = 0;
    uint32_t low = 0;
  };
  Place place(int64_t ranked) const;
  // Of those keys.
  Found find(const Place& place, std::vector<uint32_t> keys, int64_t at_pivot) const;
  // By how many there are of each; none are counted at a pivot.
  static Found find(const Place& place, const std::vector<int64_t>& counts);

  // The k-th smallest key of the sample, from 1, if the window has it.
  std::optional<uint32_t> of_sample(int64_t k);

 private:
  typedef std::array<int64_t, kBins> Bins;

  void set_window(int32_t low, int32_t high);
  double margin(int phase) const;
  // U of squared_differences() around where the threshold seems to be.
  double profile_at_estimate() const;
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
  std::optional<Profile> profile_;
  Bins to_come_{};     // of the sample, what lies in phases that are to come
  int64_t below_ = 0;  // counted
  Bins bins_{};
  Bracket bracket_{0, kMaxKey, -1};
  int32_t estimate_ = kMaxKey;
  bool fixed_ = false;  // the bracket
};

}  // namespace cpu
}  // namespace rose
