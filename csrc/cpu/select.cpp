#include "select.h"

#include <mutex>

namespace rose {
namespace cpu {
namespace {

class Counter final : public Body {
 public:
  explicit Counter(const RiskSource& source) : source_(source) {}

  void run(size_t index, int64_t start, int n, uint32_t, const Stage& stage, Notes& notes,
           UpdateCounts&) override {
    Buffers buffers;
    loops().rank(source_.open(index, start, n, buffers), source_.risk(index), stage, nullptr, notes);
  }
  int redo(size_t, int64_t, const float*, bool) override { return 0; }
  void prefetch(size_t, int64_t) const override {}
  Logs logs() const override { return Logs::kKeys; }

 private:
  const RiskSource& source_;
};

// How many keys with the bits `prefix` above them have each digit: `bins` of them, from bit `shift` on.
std::vector<int64_t> count_digits(const RiskSource& source, uint32_t prefix, int shift, size_t bins,
                                  Notes& unranked) {
  const Chunks chunks(source.segments.tiles());
  std::vector<int64_t> total(bins);
  std::mutex mutex;
  share_out(chunks.count, [&](auto next) {
    Notes notes;
    std::vector<uint32_t> counts(bins);
    std::vector<int64_t> own(bins);
    int64_t since = 0;
    const auto move = [&] {
      for (size_t i = 0; i < bins; ++i) own[i] += counts[i];
      std::fill(counts.begin(), counts.end(), 0);
      since = 0;
    };
    Buffers buffers;
    for (int64_t chunk = next(); chunk >= 0; chunk = next()) {
      for_each_run(source.segments, chunks.begin(chunk), chunks.end(chunk),
                   [&](size_t index, int64_t start, int n) {
                     loops().digits(source.open(index, start, n, buffers), source.risk(index), prefix,
                                    shift, static_cast<int>(bins), counts.data(), notes);
                   });
      since += (chunks.end(chunk) - chunks.begin(chunk)) * kTile;
      if (since >= INT32_MAX) move();  // before 32 bits are too few
    }
    move();
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < bins; ++i) total[i] += own[i];
    unranked.inactive += notes.inactive;
    unranked.nonfinite += notes.nonfinite;
  });
  return total;
}

// The k-th smallest key, from 1, by its digits of 11, 10 and 10 bits, the first of which are counted.
Threshold::Found radix_select(const RiskSource& source, const std::vector<int64_t>& leading,
                              int64_t k) {
  Threshold::Found found;
  if (k == 0) return found;
  std::vector<int64_t> bins = leading;
  uint32_t prefix = 0;
  for (int shift = 20;; shift -= 10) {
    size_t digit = 0;
    while (found.at_or_below + bins[digit] < k) found.at_or_below += bins[digit++];
    prefix = prefix * static_cast<uint32_t>(bins.size()) + static_cast<uint32_t>(digit);
    if (shift == 0) {
      found.key = prefix;
      found.at_or_below += bins[digit];
      return found;
    }
    Notes ignored;
    bins = count_digits(source, prefix, shift - 10, 1024, ignored);
  }
}

}  // namespace

Selection approx_thresholds(const Ranked& ranked) {
  const int64_t all = Lines::count(ranked.source.segments);
  const Lines lines(ranked.source, strata_of(all, lines_of_approx(all)).size, ranked.draw);
  std::vector<uint32_t> keys = lines.some_keys(kFirstLines);
  const auto threshold_of = [&](int64_t units, double errors) -> std::optional<int64_t> {
    Threshold threshold(units, lines.weight(), 1, kLogOfFailure);
    std::vector<uint32_t> none;
    const std::vector<Window> windows{threshold.find_window(errors > 0 ? keys : none, errors)};
    Sample sample = lines.take(windows, [](size_t, int64_t) { return 0; })[0];
    const int64_t k = rank_of(units, sample[0].ranked);
    threshold.set_sample(std::move(sample));
    if (k == 0) return -1;
    return threshold.of_sample(k);
  };
  const auto find = [&](int64_t units) {
    if (units == 0) return int64_t{-1};
    const std::optional<int64_t> found = threshold_of(units, 4);
    return found ? *found : *threshold_of(units, 0);
  };
  Selection selection;
  selection.high = find(ranked.upper);
  selection.low = find(ranked.lower);
  return selection;
}

std::vector<int64_t> count_keys(const RiskSource& source, std::optional<uint32_t> digit) {
  Notes unranked;
  if (digit) return count_digits(source, *digit, 0, kLowDigits, unranked);
  std::vector<int64_t> counts = count_digits(source, 0, kLowDigitBits, kHighDigits, unranked);
  counts.push_back(unranked.inactive);
  counts.push_back(unranked.nonfinite);
  return counts;
}

Selection select(const Ranked& ranked, bool approx) {
  const RiskSource& source = ranked.source;
  Counter counter(source);
  UpdateCounts none;
  Ranked all = ranked;  // of the source's own segments
  for (size_t i = 0; i < all.chosen.size(); ++i) all.chosen[i] = i;
  if (approx && source.segments.elements() >= kFewestOfApprox) {
    return given_pass(source.segments, all.chosen, approx_thresholds(all), counter, none);
  }
  const std::optional<Selection> found = bracket_pass(source.segments, all, counter, none);
  if (found && found->misses == 0) return *found;
  if (ranked.shared) return nothing_done();

  Notes unranked;
  const std::vector<int64_t> leading = count_digits(source, 0, 20, 2048, unranked);
  Selection selection;
  selection.inactive = unranked.inactive;
  selection.nonfinite = unranked.nonfinite;
  selection.ranked = source.segments.elements() - unranked.inactive - unranked.nonfinite;
  const auto high = radix_select(source, leading, rank_of(ranked.upper, selection.ranked));
  const auto low = radix_select(source, leading, rank_of(ranked.lower, selection.ranked));
  selection.high = high.key;
  selection.low = low.key;
  selection.kept = std::max<int64_t>(0, high.at_or_below - low.at_or_below);
  return selection;
}

}  // namespace cpu
}  // namespace rose
