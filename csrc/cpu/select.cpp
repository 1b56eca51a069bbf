// How: a sample gives, for each threshold, a narrow window of keys that almost surely holds it. One
// pass over the data counts what is below the window and logs the keys inside, and the answer is found
// in the log. The counts prove it: if the rank falls outside (or the log overflows), a radix select
// over the full range, 11 + 10 + 10 bits in three passes, finds the same key. Luck decides the time
// only.
#include "select.h"

#include "sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>

namespace rose {
namespace cpu {
namespace {

constexpr uint32_t kMaxKey = kInfinityBits;

struct Threshold {
  int64_t key = -1;         // -1: rank 0
  int64_t at_or_below = 0;  // ranked elements with a key <= `key`
};

using Scratch = float[3 * kTile];

// ------------------------------------------------------------------------------------------ radix

struct DigitHistogram {
  std::vector<int64_t> bins;
  std::mutex mutex;

  explicit DigitHistogram(size_t size) : bins(size) {}

  template <typename Counts>
  void merge(const Counts& counts, size_t copies) {
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t copy = 0; copy < copies; ++copy) {
      for (size_t i = 0; i < bins.size(); ++i) bins[i] += counts[copy * bins.size() + i];
    }
  }
};

// Histogram of the leading 11 bits of every key; the last two bins count the inactive and non-finite.
std::vector<int64_t> leading_digits(const RiskSource& source) {
  DigitHistogram total(kDigitBins);
  struct State {
    Scratch scratch;
    std::vector<uint32_t> counts = std::vector<uint32_t>(kDigitBins * kHistogramCopies);
    int64_t pending = 0;
  };
  const auto flush = [&](State& state) {
    total.merge(state.counts, kHistogramCopies);
    std::fill(state.counts.begin(), state.counts.end(), 0);
    state.pending = 0;
  };
  for_each_tile(
      source.segments, [] { return State(); },
      [&](State& state, size_t index, int64_t start, int n) {
        const Risk risk = source.risk(index, start, n, state.scratch);
        tile_kernels().histogram(risk, n, state.counts.data());
        state.pending += n;
        if (state.pending > int64_t{1} << 31) flush(state);  // 32-bit counters
      },
      flush);
  return total.bins;
}

// Histogram of the next `bits` below `shift + bits` over the keys that share `prefix` above them.
std::vector<int64_t> next_digits(const RiskSource& source, uint32_t prefix, int shift, int bits) {
  DigitHistogram total(size_t{1} << bits);
  struct State {
    Scratch scratch;
    uint32_t matches[kTile + kLine];
    std::vector<int64_t> counts;
  };
  for_each_tile(
      source.segments,
      [&] {
        State state;
        state.counts.resize(size_t{1} << bits);
        return state;
      },
      [&](State& state, size_t index, int64_t start, int n) {
        const Risk risk = source.risk(index, start, n, state.scratch);
        const int matches = tile_kernels().filter(risk, n, prefix, shift + bits, state.matches);
        const uint32_t mask = (1u << bits) - 1;
        for (int i = 0; i < matches; ++i) ++state.counts[(state.matches[i] >> shift) & mask];
      },
      [&](State& state) { total.merge(state.counts, 1); });
  return total.bins;
}

// The bin that holds rank k (from 1); `before` grows by what the bins below it hold.
uint32_t bin_of_rank(const std::vector<int64_t>& bins, int64_t k, int64_t& before) {
  uint32_t bin = 0;
  while (before + bins[bin] < k) before += bins[bin++];
  return bin;
}

Threshold radix_select(const RiskSource& source, const std::vector<int64_t>& leading, int64_t k,
                       bool approx) {
  Threshold result;
  if (k == 0) return result;
  int64_t before = 0;
  uint32_t prefix = bin_of_rank(leading, k, before);
  int64_t inside = leading[prefix];
  int shift = kDigitShift;
  for (; shift > 0 && !approx; shift -= 10) {
    const std::vector<int64_t> bins = next_digits(source, prefix, shift - 10, 10);
    const uint32_t digit = bin_of_rank(bins, k, before);
    prefix = prefix << 10 | digit;
    inside = bins[digit];
  }
  result.key = std::min<int64_t>(((int64_t{prefix} + 1) << shift) - 1, kMaxKey);
  result.at_or_below = before + inside;
  return result;
}

// ----------------------------------------------------------------------------------------- window

constexpr int64_t kMaxSampleLines = 8192;
constexpr int64_t kLogAll = 1 << 17;       // up to so many elements, every key is logged
constexpr int64_t kLogCapacity = 1 << 20;  // keys in a log, or 1 bit per element if that is more
// Standard errors on each side of the sampled threshold. A miss (6e-5 if the estimate is normal) costs
// three more passes, a wider window costs every step.
constexpr double kStandardErrors = 4.0;

// One cache line at a random place in each of many equal strata of the index space: a fixed stride
// would resonate with the lengths of rows. At most 1/16 of the data.
struct Sample {
  std::vector<uint32_t> keys;  // ranked only, grouped by line
  std::vector<size_t> line_ends;
};

Sample draw_sample(const RiskSource& source) {
  const Segments& segments = source.segments;
  // The window's width falls as 1 / sqrt(lines), so n^(2/3) lines balance its cost and the sample's.
  const double root = std::cbrt(static_cast<double>(segments.elements()));
  const int64_t lines = std::min(kMaxSampleLines, static_cast<int64_t>(root * root / 20));
  Sample sample;
  sample.keys.reserve(static_cast<size_t>(lines * kLine));
  sample.line_ends.reserve(static_cast<size_t>(lines));
  Scratch scratch;
  uint32_t keys[kLine];
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t first = segments.tiles() * line / lines;
    const int64_t last = std::max(first + 1, segments.tiles() * (line + 1) / lines);
    const uint32_t random = mix(static_cast<uint32_t>(line));
    const int64_t tile = first + static_cast<int64_t>(random >> 8) % (last - first);
    const size_t index = segments.find(tile);
    const Segment& segment = segments[index];
    const int64_t start =
        (tile - segment.first_tile) * kTile + static_cast<int64_t>(random % (kTile / kLine)) * kLine;
    const int n = static_cast<int>(std::min<int64_t>(kLine, segment.n - start));
    if (n <= 0) continue;  // the last tile of a segment may be short
    tile_kernels().keys(source.risk(index, start, n, scratch), n, keys);
    for (int i = 0; i < n; ++i) {
      if (keys[i] < kInactiveKey) sample.keys.push_back(keys[i]);
    }
    sample.line_ends.push_back(sample.keys.size());
  }
  return sample;
}

// The keys between which the `fraction` quantile lies, as far as the sample can tell. Elements of one
// line are correlated, so the standard error comes from the variance between lines.
Window window_of(const Sample& sample, double fraction) {
  const Window everything{0, kMaxKey, kMaxKey};
  const auto size = static_cast<int64_t>(sample.keys.size());
  if (size == 0) return everything;
  std::vector<uint32_t> sorted = sample.keys;
  const auto key_at = [&](double position) {
    const int64_t i = std::min(size - 1, std::max<int64_t>(0, static_cast<int64_t>(position)));
    std::nth_element(sorted.begin(), sorted.begin() + i, sorted.end());
    return sorted[i];
  };
  const double position = fraction * static_cast<double>(size);
  const uint32_t pivot = key_at(position);
  double variance = 0;
  size_t begin = 0;
  for (const size_t end : sample.line_ends) {
    double below = 0;
    for (size_t i = begin; i < end; ++i) below += sample.keys[i] <= pivot;
    const double residual = below - fraction * static_cast<double>(end - begin);
    variance += residual * residual;
    begin = end;
  }
  const double margin = kStandardErrors * std::sqrt(variance) + 1;
  Window window{0, kMaxKey, pivot};
  if (position > margin) window.lo = key_at(position - margin);
  if (position + margin < static_cast<double>(size)) window.hi = key_at(position + margin);
  return window;
}

// What one pass finds out about one window, over all threads.
struct WindowPass {
  Window window;
  int64_t below = 0, at_pivot = 0;
  std::vector<uint32_t> log;
  bool overflow = false;  // more than `capacity` keys: the log is not complete
};

// Counts and logs for all windows at once.
ClassCounts scan(const RiskSource& source, std::vector<WindowPass>& passes, size_t capacity) {
  ClassCounts total;
  std::mutex mutex;
  constexpr size_t kPending = 16 * kTile;
  struct State {
    Scratch scratch;
    ClassCounts classes;
    std::vector<WindowLog> windows;
    std::vector<std::vector<uint32_t>> pending;  // what windows log to
  };
  const auto flush = [&](State& state, size_t w) {
    std::lock_guard<std::mutex> lock(mutex);
    WindowPass& pass = passes[w];
    WindowLog& window = state.windows[w];
    pass.overflow = pass.overflow || pass.log.size() + static_cast<size_t>(window.logged) > capacity;
    if (!pass.overflow) pass.log.insert(pass.log.end(), window.log, window.log + window.logged);
    pass.below += window.below;
    pass.at_pivot += window.at_pivot;
    window.below = window.at_pivot = window.logged = 0;
  };
  for_each_tile(
      source.segments,
      [&] {
        State state;
        for (const WindowPass& pass : passes) {
          state.pending.emplace_back(kPending + kTile + kLine);
          WindowLog window;
          window.window = pass.window;
          window.log = state.pending.back().data();
          state.windows.push_back(window);
        }
        return state;
      },
      [&](State& state, size_t index, int64_t start, int n) {
        const Risk risk = source.risk(index, start, n, state.scratch);
        tile_kernels().scan(risk, n, state.classes, state.windows.data(),
                            static_cast<int>(state.windows.size()));
        for (size_t w = 0; w < passes.size(); ++w) {
          if (state.windows[w].logged > static_cast<int64_t>(kPending)) flush(state, w);
        }
      },
      [&](State& state) {
        for (size_t w = 0; w < passes.size(); ++w) flush(state, w);
        std::lock_guard<std::mutex> lock(mutex);
        total.ranked += state.classes.ranked;
        total.inactive += state.classes.inactive;
        total.nonfinite += state.classes.nonfinite;
      });
  return total;
}

// k-th smallest of the log, k from 0. One histogram narrows it down to few keys.
uint32_t kth_of_log(std::vector<uint32_t>& log, Window window, int64_t k) {
  int shift = 0;
  while ((window.hi - window.lo) >> shift >= 4096) ++shift;
  std::vector<int64_t> bins(4096);
  for (const uint32_t key : log) ++bins[(key - window.lo) >> shift];
  int64_t before = 0;
  const uint32_t bin = bin_of_rank(bins, k + 1, before);
  std::vector<uint32_t> few;
  few.reserve(static_cast<size_t>(bins[bin]));
  for (const uint32_t key : log) {
    if ((key - window.lo) >> shift == bin) few.push_back(key);
  }
  std::nth_element(few.begin(), few.begin() + (k - before), few.end());
  return few[static_cast<size_t>(k - before)];
}

// The k-th smallest key, if this pass settles it.
bool resolve(WindowPass& pass, int64_t k, Threshold& result) {
  if (k == 0) return true;
  const auto logged = static_cast<int64_t>(pass.log.size());
  const int64_t inside = k - 1 - pass.below;  // rank in the window, from 0
  if (pass.overflow || inside < 0 || inside >= logged + pass.at_pivot) return false;
  const uint32_t pivot = pass.window.pivot;
  const int64_t under_pivot =
      std::count_if(pass.log.begin(), pass.log.end(), [=](uint32_t key) { return key < pivot; });
  if (inside < under_pivot) {
    result.key = kth_of_log(pass.log, pass.window, inside);
  } else if (inside < under_pivot + pass.at_pivot) {
    result.key = pivot;
  } else {
    result.key = kth_of_log(pass.log, pass.window, inside - pass.at_pivot);
  }
  result.at_or_below = pass.below + (pivot <= result.key ? pass.at_pivot : 0) +
                       std::count_if(pass.log.begin(), pass.log.end(), [&](uint32_t key) {
                         return static_cast<int64_t>(key) <= result.key;
                       });
  return true;
}

}  // namespace

Risk RiskSource::risk(size_t index, int64_t start, int n, float* scratch) const {
  const Segment& segment = segments[index];
  const float* g = load(segment, segment.operands[0], start, n, scratch);
  if (inv_scale != 1.0f || clip != 1.0f) {
    tile_kernels().scale(g, inv_scale, clip, n, scratch + kTile);
    g = scratch + kTile;
  }
  const float* m =
      second_order ? load(segment, segment.operands[1], start, n, scratch + 2 * kTile) : nullptr;
  return {g, m, alpha[index], rank_inactive};
}

void RiskSource::keys(size_t index, int n, const float* g, const float* m, float* scratch,
                      uint32_t* keys) const {
  if (inv_scale != 1.0f || clip != 1.0f) {
    tile_kernels().scale(g, inv_scale, clip, n, scratch);
    g = scratch;
  }
  tile_kernels().keys({g, second_order ? m : nullptr, alpha[index], rank_inactive}, n, keys);
}

// Thresholds of a sample, and exact counts.
Selection select_sampled(const RiskSource& source, int64_t upper, int64_t lower, uint32_t draw) {
  int64_t lines = 0;
  for (size_t i = 0; i < source.segments.size(); ++i) {
    lines += (source.segments[i].n + kLine - 1) / kLine;
  }
  const Lines sample(
      source, std::min<int64_t>(std::max(lines / 128, std::min<int64_t>(lines / 8, 1 << 14)), 1 << 16),
      draw);
  std::vector<uint32_t> keys;
  sample.for_each(0, sample.count(), 1, [&](int64_t, const Lines::Place& place, const uint32_t* line) {
    for (int i = 0; i < place.n; ++i) {
      if (line[i] < kInactiveKey) keys.push_back(line[i]);
    }
  });
  Selection selection;
  const auto threshold = [&](int64_t units) {
    const int64_t k = rank_of(units, static_cast<int64_t>(keys.size()));
    if (k == 0) return int64_t{-1};
    std::nth_element(keys.begin(), keys.begin() + k - 1, keys.end());
    return static_cast<int64_t>(keys[static_cast<size_t>(k - 1)]);
  };
  selection.high = threshold(upper);
  selection.low = threshold(lower);
  std::mutex mutex;
  for_each_tile(
      source.segments, [] { return Selection(); },
      [&](Selection& counts, size_t index, int64_t start, int n) {
        Scratch scratch;
        uint32_t own[kTile];
        tile_kernels().keys(source.risk(index, start, n, scratch), n, own);
        for (int i = 0; i < n; ++i) {
          const int32_t key = static_cast<int32_t>(own[i]);
          counts.ranked += key >= 0;
          counts.inactive += own[i] == kInactiveKey;
          counts.kept += key >= 0 && key > selection.low && key <= selection.high;
        }
      },
      [&](const Selection& counts) {
        std::lock_guard<std::mutex> lock(mutex);
        selection.ranked += counts.ranked;
        selection.inactive += counts.inactive;
        selection.kept += counts.kept;
      });
  selection.nonfinite = source.segments.elements() - selection.ranked - selection.inactive;
  return selection;
}

Selection select(const RiskSource& source, int64_t upper, int64_t lower, bool approx, uint32_t draw) {
  if (approx && source.segments.elements() >= 1 << 20)
    return select_sampled(source, upper, lower, draw);
  approx = false;
  const std::array<int64_t, 2> fractions{upper, lower};
  const size_t targets = lower > 0 ? 2 : 1;
  std::array<Threshold, 2> thresholds;
  std::array<bool, 2> found{false, targets == 1};
  ClassCounts classes;

  if (!approx) {
    const bool log_all = source.segments.elements() <= kLogAll;
    const Sample sample = log_all ? Sample() : draw_sample(source);
    std::vector<WindowPass> passes(targets);
    for (size_t t = 0; t < targets; ++t) {
      passes[t].window = window_of(sample, static_cast<double>(fractions[t]) * 1e-9);
    }
    classes = scan(source, passes,
                   static_cast<size_t>(std::max(kLogCapacity, source.segments.elements() / 32)));
    for (size_t t = 0; t < targets; ++t) {
      found[t] = resolve(passes[t], rank_of(fractions[t], classes.ranked), thresholds[t]);
    }
  }
  if (!found[0] || !found[1]) {
    std::vector<int64_t> leading = leading_digits(source);
    classes.nonfinite = leading.back();
    classes.inactive = leading[leading.size() - 2];
    classes.ranked = source.segments.elements() - classes.inactive - classes.nonfinite;
    leading.resize(leading.size() - 2);
    for (size_t t = 0; t < targets; ++t) {
      if (found[t]) continue;
      thresholds[t] = radix_select(source, leading, rank_of(fractions[t], classes.ranked), approx);
    }
  }
  Selection selection;
  selection.high = thresholds[0].key;
  selection.low = thresholds[1].key;
  selection.kept = std::max<int64_t>(0, thresholds[0].at_or_below - thresholds[1].at_or_below);
  selection.ranked = classes.ranked;
  selection.inactive = classes.inactive;
  selection.nonfinite = classes.nonfinite;
  return selection;
}

}  // namespace cpu
}  // namespace rose
