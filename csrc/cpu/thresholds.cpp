#include "thresholds.h"

#include <algorithm>

namespace rose {
namespace cpu {

void Threshold::set_window(int32_t low, int32_t high) {
  low_ = low;
  high_ = high;
  const auto first = static_cast<uint32_t>(low);
  shift_ = shift_of({first, static_cast<uint32_t>(high), first}, kBins);
  first_bin_ = 0;
  last_bin_ = (high - low) >> shift_;
  bracket_ = {low, high, -1};
  estimate_ = high;
}

Window Threshold::find_window(std::vector<uint32_t>& keys, double errors) {
  if (!keys.empty()) {
    const auto size = static_cast<double>(keys.size());
    const auto place_of = [&](double position) {
      return keys.begin() + static_cast<int64_t>(std::clamp(position, 0.0, size - 1));
    };
    const double q = fraction_, position = q * size;
    const double margin = window_margin(errors, q, size);
    const auto low = place_of(position - margin), middle = place_of(position);
    const auto high = place_of(position + margin);
    std::nth_element(keys.begin(), middle, keys.end());
    std::nth_element(keys.begin(), low, middle);
    std::nth_element(middle, high, keys.end());
    middle_ = static_cast<int32_t>(*middle);
    set_window(position > margin ? static_cast<int32_t>(*low) : 0,
               position + margin < size ? static_cast<int32_t>(*high) : kMaxKey);
  }
  return {static_cast<uint32_t>(low_), static_cast<uint32_t>(high_), static_cast<uint32_t>(middle_)};
}

Window Threshold::window_around(int32_t key) {
  constexpr int32_t kOctave = 1 << 23;
  middle_ = key;
  set_window(std::max(key, kOctave) - kOctave, std::min(key, kMaxKey - kOctave) + kOctave - 1);
  return {static_cast<uint32_t>(low_), static_cast<uint32_t>(high_), static_cast<uint32_t>(middle_)};
}

void Threshold::set_sample(Sample&& sample, const Profile* profile) {
  sample_ = std::move(sample);
  if (profile) {
    profile_ = *profile;
    std::copy(profile->bins, profile->bins + kBins, to_come_.begin());
  }
  for (const PhaseSample& phase : sample_) {
    for (const uint32_t key : phase.keys) ++to_come_[static_cast<size_t>(bin(key))];
  }
}

double Threshold::profile_at_estimate() const {
  double d = start_of_window(0, 0);
  int estimate = 0;
  for (int b = 0; b < last_bin_ && d < 0; ++b) {
    d += weight_ * static_cast<double>(to_come_[static_cast<size_t>(b)]);
    estimate = b;
  }
  const auto low = static_cast<uint32_t>(low_), high = static_cast<uint32_t>(high_);
  const int cell = (estimate << shift_) >> shift_of({low, high, low}, Profile::kCells);
  double u = 0;
  for (int k = std::max(cell - 1, 0); k <= std::min(cell + 1, Profile::kCells - 1); ++k) {
    u = std::max(u, squared_differences(static_cast<double>(profile_->cc[k]),
                                        static_cast<double>(profile_->cr[k]),
                                        static_cast<double>(sample_[0].rr), fraction_));
  }
  return u;
}

double Threshold::margin(int phase) const {
  int64_t cc = 0, cr = 0, rr = 0;
  for (int j = phase; j < kPhases; ++j) {
    const PhaseSample& s = sample_[static_cast<size_t>(j)];
    cc += s.cc;
    cr += s.cr;
    rr += s.rr;
  }
  const double u = profile_ ? profile_at_estimate()
                            : squared_differences(static_cast<double>(cc), static_cast<double>(cr),
                                                  static_cast<double>(rr), fraction_);
  return width_ * weight_ * half_width(u, log_of_failure_);
}

double Threshold::start_of_window(int phase, int64_t ranked) const {
  double below = static_cast<double>(below_), all = static_cast<double>(ranked);
  for (int j = phase; j < kPhases; ++j) {
    const PhaseSample& s = sample_[static_cast<size_t>(j)];
    below += weight_ * static_cast<double>(s.below);
    all += weight_ * static_cast<double>(s.ranked);
  }
  return below - fraction_ * all;
}

bool Threshold::narrow(int phase, int64_t ranked) {
  const double t = margin(phase);
  // From bin to bin: the estimated number of elements up to there, less the rank of the threshold.
  double d = start_of_window(phase, ranked);
  int first = -1, middle = -1, last = -1;
  if (phase == 0 && low_ > 0 && !is_surely_before(d, t)) return false;
  for (int b = 0; b <= last_bin_ && last < 0; ++b) {
    d += static_cast<double>(bins_[static_cast<size_t>(b)]) +
         weight_ * static_cast<double>(to_come_[static_cast<size_t>(b)]);
    if (b < first_bin_) continue;
    if (first < 0 && !is_surely_before(d, t)) first = b;
    if (middle < 0 && d >= 0) middle = b;
    if (is_surely_behind(d, t)) last = b;
  }
  if (last < 0) {
    if (phase == 0 && high_ < kMaxKey) return false;
    last = last_bin_;
  }
  first_bin_ = first < 0 ? last : first;
  last_bin_ = last;
  const int32_t low = start_of(first_bin_), high = end_of(last), pivot = bracket_.pivot;
  bracket_ = {low, high, pivot >= low && pivot <= high ? pivot : -1};
  estimate_ = middle < 0 ? high : end_of(middle);
  return true;
}

bool Threshold::start() { return narrow(0, 0); }

void Threshold::count(int phase, const Tally& tally) {
  below_ += tally.below[phase];
  for (size_t b = 0; b < bins_.size(); ++b) bins_[b] += tally.bins[phase][b];
}

void Threshold::tighten(int phase, int64_t ranked) {
  for (const uint32_t key : sample_[static_cast<size_t>(phase - 1)].keys) {
    --to_come_[static_cast<size_t>(bin(key))];
  }
  if (!fixed_) narrow(phase, ranked);
}

double Threshold::inside() const {
  int64_t count = 0;
  for (int b = first_bin_; b <= last_bin_; ++b) count += to_come_[static_cast<size_t>(b)];
  return weight_ * static_cast<double>(count);
}

std::vector<uint32_t> Threshold::sampled_keys() const {
  std::vector<uint32_t> keys;
  for (const PhaseSample& phase : sample_) {
    keys.insert(keys.end(), phase.keys.begin(), phase.keys.end());
  }
  return keys;
}

bool Threshold::collapse() {
  std::vector<uint32_t> keys = sampled_keys();
  std::sort(keys.begin(), keys.end());
  const double t = margin(0), d = start_of_window(0, 0);
  for (size_t i = 0; i < keys.size();) {
    size_t end = i;
    while (end < keys.size() && keys[end] == keys[i]) ++end;
    const double below = d + weight_ * static_cast<double>(i);
    if (is_surely_between(below, d + weight_ * static_cast<double>(end), t)) {
      estimate_ = static_cast<int32_t>(keys[i]);
      bracket_ = {estimate_, estimate_, estimate_};
      first_bin_ = last_bin_ = pivot_bin();
      return fixed_ = true;
    }
    i = end;
  }
  return false;
}

bool Threshold::collapse_onto_middle() {
  const double under = start_of_window(0, 0) + weight_ * static_cast<double>(profile_->under_middle);
  const double upto = under + weight_ * static_cast<double>(profile_->at_middle);
  if (!is_surely_between(under, upto, margin(0))) return false;
  estimate_ = middle_;
  bracket_ = {middle_, middle_, middle_};
  first_bin_ = last_bin_ = pivot_bin();
  return fixed_ = true;
}

double Threshold::set_pivot() {
  std::vector<uint32_t> keys = sampled_keys();
  std::sort(keys.begin(), keys.end());
  int64_t most = 0;
  for (size_t i = 0; i < keys.size();) {
    size_t end = i;
    while (end < keys.size() && keys[end] == keys[i]) ++end;
    const auto key = static_cast<int32_t>(keys[i]);
    if (static_cast<int64_t>(end - i) > most && key >= bracket_.low && key <= bracket_.high) {
      most = static_cast<int64_t>(end - i);
      bracket_.pivot = key;
    }
    i = end;
  }
  return inside() - weight_ * static_cast<double>(most);
}

Threshold::Place Threshold::place(int64_t ranked) const {
  const int64_t k = rank_of(units_, ranked);
  int64_t before = below_;
  for (int b = 0; b < first_bin_; ++b) before += bins_[static_cast<size_t>(b)];
  if (collapsed()) {  // nothing is logged: that key is the threshold, whatever the counts say
    const int64_t upto = before + bins_[static_cast<size_t>(first_bin_)];
    return {{bracket_.pivot, upto, k <= before || k > upto}};
  }
  if (k == 0 && before == 0) return {};
  if (k <= before) return {{int64_t{bracket_.low} - 1, before, true}};
  for (int b = first_bin_; b <= last_bin_; ++b) {
    const int64_t inside = bins_[static_cast<size_t>(b)];
    if (k <= before + inside) {
      const int32_t low = std::max(start_of(b), bracket_.low),
                    high = std::min(end_of(b), bracket_.high);
      return {{}, high - low, k - before - 1, before, static_cast<uint32_t>(low)};
    }
    before += inside;
  }
  return {{bracket_.high, before, true}};
}

Threshold::Found Threshold::find(const Place& place, std::vector<uint32_t> keys,
                                 int64_t at_pivot) const {
  int64_t at = place.at, before = place.before;
  const auto pivot = static_cast<uint32_t>(bracket_.pivot);
  if (pivot - place.low <= place.span) {
    // Elements at the pivot are counted; the bracket of the other threshold may have logged them, too.
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

Threshold::Found Threshold::find(const Place& place, const std::vector<int64_t>& counts) {
  int64_t upto = counts[0], offset = 0;
  while (upto <= place.at) upto += counts[static_cast<size_t>(++offset)];
  return {place.low + offset, place.before + upto, false};
}

std::optional<uint32_t> Threshold::of_sample(int64_t k) {
  for (const PhaseSample& phase : sample_) k -= phase.below;
  if (k < 1) return std::nullopt;
  int place = 0;
  while (place <= last_bin_ && k > to_come_[static_cast<size_t>(place)]) {
    k -= to_come_[static_cast<size_t>(place++)];
  }
  if (place > last_bin_) return std::nullopt;
  std::vector<uint32_t> keys = sampled_keys();
  const auto end =
      std::partition(keys.begin(), keys.end(), [&](uint32_t key) { return bin(key) == place; });
  std::nth_element(keys.begin(), keys.begin() + (k - 1), end);
  return keys[static_cast<size_t>(k - 1)];
}

}  // namespace cpu
}  // namespace rose
