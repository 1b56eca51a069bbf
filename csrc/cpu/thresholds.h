// One threshold while it is looked for: what the sample says of it, what was counted so far, and the
// bracket that follows from both. How wide a bracket has to be is in include/rose/threshold.h.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "sample.h"

namespace rose {
namespace cpu {

constexpr int32_t kMaxKey = static_cast<int32_t>(kInfinityBits);

// What one thread has counted in each phase: elements below the bracket, and those inside it, by bins
// of the window.
struct Tally {
  int64_t below[kPhases] = {};
  uint32_t bins[kPhases][kBins] = {};
};

class Threshold {
 public:
  // `units`: the fraction of elements that are at or below the threshold, in units of 1e-9. `weight`:
  // how many lines a line of the sample stands for. `width`: what half-widths of brackets are
  // multiplied by, 1 except in tests. A bound fails with a probability of exp(-log_of_failure).
  Threshold(int64_t units, double weight, double width, double log_of_failure)
      : units_(units),
        fraction_(static_cast<double>(units) * 1e-9),
        weight_(weight),
        width_(width),
        log_of_failure_(log_of_failure) {}

  // Sets the window, in which the sample is looked at closely, from the keys of a first, small sample:
  // `errors` standard errors on each side of its quantile, see window_margin(). If the window does not
  // hold the bracket, that only costs time.
  Window find_window(std::vector<uint32_t>& keys, double errors);
  // Sets the window to an octave (a factor of 2 in the risk) on each side of `key`, which is the
  // threshold of an earlier step: so processes that share a ranking have the same one.
  Window window_around(int32_t key);
  // Takes the sample; with a profile instead of its keys, where processes share a ranking.
  void set_sample(Sample&& sample, const Profile* profile = nullptr);

  // Does without a sample: the bracket holds all keys, and stays as it is.
  void log_all() { fixed_ = true; }
  // Sets the bracket with which the pass begins. False if it would reach beyond the window.
  bool start();
  // How many elements the bracket is expected to have, before the pass.
  double inside() const;
  // If the threshold surely is a key that many elements have, makes that key all of the bracket, and
  // returns true.
  bool collapse();
  // The same for one key only, the middle of the window: of the others, a profile does not know how
  // many elements have them.
  bool collapse_onto_middle();
  // Lets the elements of the most frequent key of the bracket be counted instead of logged. Returns how
  // many elements are expected to be logged then.
  double set_pivot();
  // Adds what one thread has counted in a phase.
  void count(int phase, const Tally& tally);
  // Tightens the bracket by what is known when all phases before `phase` are counted, in which `ranked`
  // elements are ranked.
  void tighten(int phase, int64_t ranked);

  Bracket bracket() const { return bracket_; }
  // The key by which elements inside the bracket are treated, until the threshold is known.
  int32_t estimate() const { return estimate_; }
  bool collapsed() const { return fixed_ && bracket_.pivot >= 0 && bracket_.low == bracket_.high; }
  int bin(uint32_t key) const {
    return static_cast<int>((key - static_cast<uint32_t>(low_)) >> shift_);
  }
  int pivot_bin() const { return bin(static_cast<uint32_t>(bracket_.pivot)); }

  // Calls visit(number) for all numbers of a sample, of one phase, that processes add up.
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
  // The same for all numbers that they have counted in the pass.
  template <typename Visit>
  void visit_counts(Visit visit) {
    visit(below_);
    for (int64_t& bin : bins_) visit(bin);
  }
  // Makes the bracket stay as it is during the pass.
  void fix() { fixed_ = true; }

  // The threshold's key, how many are at or below it, and whether it was missed.
  struct Found {
    int64_t key = -1, at_or_below = 0;
    bool missed = false;
  };
  // Where the threshold is, when all phases are counted. If `span` is not negative, it is one of the
  // logged keys with low <= key <= low + span, and of those the at-th smallest one, from 0; `before`
  // elements have smaller keys than `low`. Else `found` says what it is.
  struct Place {
    Found found;
    int64_t span = -1, at = 0, before = 0;
    uint32_t low = 0;
  };
  // Of `ranked` elements in all.
  Place place(int64_t ranked) const;
  // The threshold among `keys`, which are those of the place. If the bracket has a pivot, `at_pivot`
  // elements have that key, and are not among them.
  Found find(const Place& place, std::vector<uint32_t> keys, int64_t at_pivot) const;
  // The same if counts[i] elements have the key place.low + i, and there is no pivot.
  static Found find(const Place& place, const std::vector<int64_t>& counts);

  // The k-th smallest key of the sample, from 1; null if it is not in the window.
  std::optional<uint32_t> of_sample(int64_t k);

 private:
  typedef std::array<int64_t, kBins> Bins;

  void set_window(int32_t low, int32_t high);
  // The half-width of the bracket, in elements, when phases before `phase` are counted: the error of
  // the sample in the others.
  double margin(int phase) const;
  // U of squared_differences(), the largest near where the threshold seems to be.
  double profile_at_estimate() const;
  // The first and the last key of a bin of the window.
  int32_t start_of(int bin) const { return low_ + (bin << shift_); }
  int32_t end_of(int bin) const {
    return static_cast<int32_t>(
        std::min<int64_t>(low_ + ((static_cast<int64_t>(bin) + 1) << shift_) - 1, high_));
  }
  // The estimated number of elements below the window, less the rank of the threshold. Of the phases
  // before `phase`, in which `ranked` elements are ranked, the numbers are known; of the others, the
  // sample says them.
  double start_of_window(int phase, int64_t ranked) const;
  // Sets the bracket and the estimate by what is known when phases before `phase` are counted. False if
  // the bracket would reach beyond the window.
  bool narrow(int phase, int64_t ranked);
  std::vector<uint32_t> sampled_keys() const;

  int64_t units_;
  double fraction_, weight_, width_, log_of_failure_;
  int32_t low_ = 0, high_ = kMaxKey, middle_ = kMaxKey;  // the window
  int shift_ = 21;                                       // a bin of it has 2^shift_ keys
  int first_bin_ = 0, last_bin_ = kMaxKey >> 21;         // those of the bracket
  Sample sample_;
  std::optional<Profile> profile_;
  Bins to_come_{};     // keys of the sample in phases that are not counted yet, by bins
  int64_t below_ = 0;  // what is counted: elements below the bracket,
  Bins bins_{};        // and those inside it, by bins
  Bracket bracket_{0, kMaxKey, -1};
  int32_t estimate_ = kMaxKey;
  bool fixed_ = false;  // the bracket stays as it is
};

}  // namespace cpu
}  // namespace rose
