#include "bracket.h"

#include "sample.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

namespace rose {
namespace cpu {
namespace {

constexpr int64_t kFewest = int64_t{1} << 22;  // elements: below, the sample would be too large a part
constexpr int64_t kFewestInTests = int64_t{1} << 16;
constexpr int64_t kPhases = 16;  // between which brackets are tightened
constexpr int64_t kShares = 64;  // of a log, for threads to redo
constexpr int kBins = 2048;      // of the window that a first sample gives
constexpr int32_t kMaxKey = static_cast<int32_t>(kInfinityBits);

// ------------------------------------------------------------------------------------------- sampling

// What the sample has in one phase, by one threshold.
struct PhaseSample {
  int64_t below = 0;  // the window
  std::array<int64_t, kBins> bins{};
  // Sums of products of differences between neighbouring lines, of their elements that are ranked (r)
  // and of those that are at or below the window's middle (c), too.
  int64_t cc = 0, cr = 0, rr = 0;
};

// ------------------------------------------------------------------------------------------ thresholds

// One threshold on its way: sample and counts so far, by bins of a window of keys.
struct Target {
  double fraction;
  int64_t units;
  int32_t low = 0, high = kMaxKey, middle = kMaxKey;  // the window
  int shift = 0;
  std::array<PhaseSample, kPhases> sample;
  std::array<int64_t, kBins> to_come{};  // of the sample, what lies in phases that are to come
  std::vector<uint32_t> keys;            // of the sample in the window
  // Of the pass
  int64_t below = 0, at_pivot = 0;
  std::array<int64_t, kBins> logged{};
  int first_bin = 0, last_bin = kBins - 1;
  Bracket bracket{0, kMaxKey, -1};
  int32_t estimate = kMaxKey;

  bool collapsed() const { return bracket.pivot >= 0; }
  Window window() const {
    return {static_cast<uint32_t>(low), static_cast<uint32_t>(high), static_cast<uint32_t>(middle)};
  }
  int bin(uint32_t key) const { return static_cast<int>((key - static_cast<uint32_t>(low)) >> shift); }
  int32_t start_of(int bin) const { return low + (bin << shift); }
  int32_t end_of(int bin) const {
    return static_cast<int32_t>(
        std::min<int64_t>(low + ((static_cast<int64_t>(bin) + 1) << shift) - 1, high));
  }
  void set_window(int32_t from, int32_t to) {
    low = from;
    high = to;
    while ((high - low) >> shift >= kBins) ++shift;
    last_bin = (high - low) >> shift;
  }
};

// Everything about the sample that is not of one threshold.
struct Ranked {
  std::array<int64_t, kPhases> sampled{};
  int64_t counted = 0;  // in the pass
};

class Plan {
 public:
  Plan(const Lines& lines, double width) : weight_(lines.weight()), width_(width) {}

  // Half-width in elements, of what is left from `phase` on.
  double margin(const Target& target, int64_t phase) const {
    double u = 0;
    const double q = target.fraction;
    for (int64_t j = phase; j < kPhases; ++j) {
      const PhaseSample& s = target.sample[static_cast<size_t>(j)];
      u += static_cast<double>(s.cc) - 2 * q * static_cast<double>(s.cr) +
           q * q * static_cast<double>(s.rr);
    }
    const double l = kLogOfFailure;
    return width_ * weight_ * (std::sqrt(2 * l * std::max(u, 0.0)) + 8.0 / 3.0 * kLine * l);
  }

  // Estimated number of elements below the window, less the fraction of all that are ranked.
  double start(const Target& target, const Ranked& ranked, int64_t phase) const {
    double below = static_cast<double>(target.below), all = static_cast<double>(ranked.counted);
    for (int64_t j = phase; j < kPhases; ++j) {
      below += weight_ * static_cast<double>(target.sample[static_cast<size_t>(j)].below);
      all += weight_ * static_cast<double>(ranked.sampled[static_cast<size_t>(j)]);
    }
    return below - target.fraction * all;
  }

  // Tightens the bracket by all that is known before `phase`; false if it has no end.
  bool tighten(Target& target, const Ranked& ranked, int64_t phase) const {
    const double t = margin(target, phase);
    double d = start(target, ranked, phase);
    int first = -1, middle = -1, last = -1;
    if (phase == 0 && target.low > 0 && d >= -1 - t) return false;
    for (int b = 0; b <= target.last_bin && last < 0; ++b) {
      d += static_cast<double>(target.logged[static_cast<size_t>(b)]) +
           weight_ * static_cast<double>(target.to_come[static_cast<size_t>(b)]);
      if (b < target.first_bin) continue;
      if (first < 0 && d >= -1 - t) first = b;
      if (middle < 0 && d >= 0) middle = b;
      if (d > t) last = b;
    }
    if (last < 0) {
      if (phase == 0 && target.high < kMaxKey) return false;
      last = target.last_bin;
    }
    target.first_bin = first < 0 ? last : first;
    target.last_bin = last;
    target.bracket = {target.start_of(target.first_bin), target.end_of(last), -1};
    target.estimate = middle < 0 ? target.bracket.high : target.end_of(middle);
    return true;
  }

  // Elements expected in the bracket before the pass.
  double inside(const Target& target) const {
    int64_t count = 0;
    for (int b = target.first_bin; b <= target.last_bin; ++b) {
      count += target.to_come[static_cast<size_t>(b)];
    }
    return weight_ * static_cast<double>(count);
  }

  // If the threshold is surely a key that many elements have, makes that all of the bracket.
  bool collapse(Target& target, const Ranked& ranked) const {
    std::vector<uint32_t>& keys = target.keys;
    std::sort(keys.begin(), keys.end());
    const double t = margin(target, 0), d = start(target, ranked, 0);
    for (size_t i = 0; i < keys.size();) {
      size_t end = i;
      while (end < keys.size() && keys[end] == keys[i]) ++end;
      const double below = d + weight_ * static_cast<double>(i);
      if (below < -1 - t && d + weight_ * static_cast<double>(end) > t) {
        const auto key = static_cast<int32_t>(keys[i]);
        target.bracket = {key, key, key};
        target.estimate = key;
        return true;
      }
      i = end;
    }
    return false;
  }

 private:
  double weight_, width_;
};

// A first, small sample says where to look closely: from its quantiles at 5 standard errors (if
// elements of a line are as alike as 2 in 3) on each side. A window that does not hold the bracket
// costs time only.
void find_windows(const Lines& lines, std::vector<Target>& targets) {
  constexpr int64_t kWanted = 1024;
  std::vector<uint32_t> keys;
  keys.reserve(static_cast<size_t>(kWanted * kLine * 2));
  lines.for_each(0, lines.count(), std::max<int64_t>(1, lines.count() / kWanted),
                 [&](int64_t, const Lines::Place& place, const uint32_t* of_line) {
                   for (int i = 0; i < place.n; ++i) {
                     if (of_line[i] < kInactiveKey) keys.push_back(of_line[i]);
                   }
                 });
  const auto size = static_cast<double>(keys.size());
  const auto place_of = [&](double position) {
    return keys.begin() + static_cast<int64_t>(std::clamp(position, 0.0, size - 1));
  };
  if (keys.empty()) return;
  for (Target& target : targets) {
    const double q = target.fraction, position = q * size;
    const double margin = 5 * std::sqrt(2.0 * size * q * (1 - q)) + 2 * kLine;
    const auto low = place_of(position - margin), middle = place_of(position);
    const auto high = place_of(position + margin);
    std::nth_element(keys.begin(), middle, keys.end());
    std::nth_element(keys.begin(), low, middle);
    std::nth_element(middle, high, keys.end());
    target.middle = static_cast<int32_t>(*middle);
    target.set_window(position > margin ? static_cast<int32_t>(*low) : 0,
                      position + margin < size ? static_cast<int32_t>(*high) : kMaxKey);
  }
}

// ------------------------------------------------------------------------------------------------ pass

// What a thread logs in a phase. Memory that comes and goes costs page faults: logs are kept for the
// next step.
struct Log {
  std::vector<uint32_t> keys;
  std::vector<int64_t> places;
  std::vector<std::array<float, 4>> old;
  int64_t logged = 0;

  void resize(size_t size, bool updates) {
    keys.resize(size);
    places.resize(size);
    if (updates) old.resize(size);
  }

  void make_room(bool updates) {
    const size_t wanted = static_cast<size_t>(logged + kTile);
    // A log that a capture left has no room for old values.
    if (wanted > keys.size() || (updates && wanted > old.size())) resize(wanted + wanted / 2, updates);
  }
};

class Logs {
 public:
  Log take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return {};
    Log log = std::move(free_.back());
    free_.pop_back();
    log.logged = 0;
    return log;
  }
  void give_back(std::vector<Log>&& logs) {
    constexpr size_t kMost = 64;
    std::lock_guard<std::mutex> lock(mutex_);
    for (Log& log : logs) {
      if (free_.size() < kMost) free_.push_back(std::move(log));
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Log> free_;
};

Logs& spare_logs() {
  static Logs* logs = new Logs;
  return *logs;
}

class Pass {
 public:
  Pass(const Segments& segments, const RiskSource& source, const std::vector<size_t>& chosen,
       const BracketSettings& settings, BracketBody& body, UpdateCounts& counts)
      : segments_(segments),
        source_(source),
        chosen_(chosen),
        is_ranked_(segments.size()),
        body_(body),
        counts_(counts),
        lines_(source, lines_for(source.segments.elements()), settings.draw),
        plan_(lines_, settings.width) {
    for (const size_t i : chosen) is_ranked_[i] = 1;
    for (const int64_t units : {settings.upper, settings.lower}) {
      if (units == 0) continue;
      targets_.emplace_back();
      targets_.back().units = units;
      targets_.back().fraction = static_cast<double>(units) * 1e-9;
    }
  }

  std::optional<Selection> run(BracketReport& report) {
    find_windows(lines_, targets_);
    take_sample();
    report.lines = lines_.count();
    // A log of p, m, v, g, key and place within 1 bit for each element and 14 MiB, and room to be
    // wrong.
    constexpr double kRecord = 28 * 1.25;
    const auto n = static_cast<double>(source_.segments.elements());
    const double capacity = (n / 8 + (14 << 20)) / kRecord / static_cast<double>(targets_.size());
    for (Target& target : targets_) {
      if (!plan_.tighten(target, ranked_, 0)) return std::nullopt;
      const double inside = 0.75 * plan_.inside(target);  // brackets shrink
      if (inside > capacity && !plan_.collapse(target, ranked_)) return std::nullopt;
    }
    for (size_t t = 0; t < targets_.size(); ++t) {
      report.first_low[t] = targets_[t].bracket.low;
      report.first_high[t] = targets_[t].bracket.high;
    }
    for (int64_t phase = 0; phase < kPhases; ++phase) walk(phase);
    report.one_pass = 1;
    for (size_t t = 0; t < targets_.size(); ++t) {
      report.low[t] = targets_[t].bracket.low;
      report.high[t] = targets_[t].bracket.high;
      report.collapsed += targets_[t].collapsed();
    }
    for (const Log& log : logs_) report.logged += log.logged;
    return resolve(report);
  }

 private:
  // The log shrinks as 1 / sqrt(lines): n^(2/3) lines balance its cost and the sample's.
  static int64_t lines_for(int64_t n) {
    const double root = std::cbrt(static_cast<double>(n));
    return std::max(static_cast<int64_t>(0.4 * root * root), std::min<int64_t>(1 << 14, n / kLine / 4));
  }

  int64_t phase_start(int64_t phase) const { return segments_.tiles() * phase / kPhases; }

  void take_sample() {
    std::mutex mutex;
    const int64_t pairs = (lines_.count() + 1) / 2;
    torch::stable::parallel_for(0, pairs, 256, [&](int64_t begin, int64_t end) {
      FpMode mode;
      std::vector<Target> own(targets_.size());
      for (size_t t = 0; t < own.size(); ++t) {
        own[t].set_window(targets_[t].low, targets_[t].high);
        own[t].middle = targets_[t].middle;
      }
      Ranked ranked;
      int64_t phase = 0, r = 0, earlier_r = 0;
      std::array<int64_t, 2> c{}, earlier_c{};
      lines_.for_each(
          2 * begin, std::min(2 * end, lines_.count()), 1,
          [&](int64_t line, const Lines::Place& place, const uint32_t* keys) {
            const int n = place.n;
            if (n > 0) {
              const int64_t tile = segments_[chosen_[place.index]].first_tile + place.start / kTile;
              while (phase + 1 < kPhases && phase_start(phase + 1) <= tile) ++phase;
            }
            r = 0;
            for (size_t t = 0; t < own.size(); ++t) {
              Target& target = own[t];
              PhaseSample& sample = target.sample[static_cast<size_t>(phase)];
              uint32_t inside[kLine];
              const LineCounts of_line = tile_kernels().count_line(keys, n, target.window(), inside);
              r = of_line.ranked;
              c[t] = of_line.upto_pivot;
              sample.below += of_line.below;
              for (int i = 0; i < of_line.inside; ++i) {
                ++sample.bins[static_cast<size_t>(target.bin(inside[i]))];
                target.keys.push_back(inside[i]);
              }
              // Of a last line without neighbour, the square itself is an upper bound.
              const bool alone = line % 2 == 0 && line + 1 == lines_.count();
              if (line % 2 == 1 || alone) {
                const int64_t dc = c[t] - (alone ? 0 : earlier_c[t]), dr = r - (alone ? 0 : earlier_r);
                sample.cc += dc * dc;
                sample.cr += dc * dr;
                sample.rr += dr * dr;
              }
            }
            ranked.sampled[static_cast<size_t>(phase)] += r;
            earlier_c = c;
            earlier_r = r;
          });
      std::lock_guard<std::mutex> lock(mutex);
      for (size_t j = 0; j < kPhases; ++j) ranked_.sampled[j] += ranked.sampled[j];
      for (size_t t = 0; t < own.size(); ++t) {
        Target& all = targets_[t];
        all.keys.insert(all.keys.end(), own[t].keys.begin(), own[t].keys.end());
        for (size_t j = 0; j < kPhases; ++j) {
          PhaseSample& to = all.sample[j];
          const PhaseSample& from = own[t].sample[j];
          to.below += from.below;
          to.cc += from.cc;
          to.cr += from.cr;
          to.rr += from.rr;
          for (size_t b = 0; b < kBins; ++b) {
            to.bins[b] += from.bins[b];
            all.to_come[b] += from.bins[b];
          }
        }
      }
    });
  }

  static void count_keys(const Target& target, const BracketLog& note,
                         std::array<int64_t, kBins>& bins) {
    const auto low = static_cast<uint32_t>(target.bracket.low);
    const uint32_t span = static_cast<uint32_t>(target.bracket.high) - low;
    for (int64_t i = 0; i < note.logged; ++i) {
      const uint32_t key = note.keys[i] & ~kInactiveKey;
      if (key - low <= span) ++bins[static_cast<size_t>(target.bin(key))];
    }
  }

  Bounds bounds() const {
    return {targets_[0].estimate, targets_.size() > 1 ? targets_[1].estimate : -1};
  }

  void walk(int64_t phase) {
    for (Target& target : targets_) {
      if (phase == 0 || target.collapsed()) continue;
      const PhaseSample& over = target.sample[static_cast<size_t>(phase - 1)];
      for (size_t b = 0; b < kBins; ++b) target.to_come[b] -= over.bins[b];
      plan_.tighten(target, ranked_, phase);
    }
    struct State {
      Log log;
      BracketLog note;
      UpdateCounts counts;
      int64_t elements = 0;
    };
    std::mutex mutex;
    for_each_tile(
        segments_, phase_start(phase), phase_start(phase + 1),
        [&] {
          State state;
          state.log = spare_logs().take();
          state.note.count = static_cast<int>(targets_.size());
          for (size_t t = 0; t < targets_.size(); ++t) state.note.brackets[t] = targets_[t].bracket;
          return state;
        },
        [&](State& state, size_t index, int64_t start, int n) {
          state.log.make_room(body_.updates());
          BracketLog& note = state.note;
          note.keys = state.log.keys.data();
          note.places = state.log.places.data();
          note.old = body_.updates() ? reinterpret_cast<float (*)[4]>(state.log.old.data()) : nullptr;
          note.place = segments_[index].first_tile * kTile + start;
          body_.tile(index, start, n, bounds(), note, state.counts);
          state.log.logged = note.logged;
          if (is_ranked_[index]) state.elements += n;
        },
        [&](State& state) {
          const BracketLog& note = state.note;
          std::vector<std::array<int64_t, kBins>> logged(targets_.size());
          for (size_t t = 0; t < targets_.size(); ++t) count_keys(targets_[t], note, logged[t]);
          std::lock_guard<std::mutex> lock(mutex);
          counts_.updated += state.counts.updated;
          counts_.nonfinite += state.counts.nonfinite;
          inactive_ += note.inactive;
          nonfinite_ += note.nonfinite;
          ranked_.counted += state.elements - note.inactive - note.nonfinite;
          for (size_t t = 0; t < targets_.size(); ++t) {
            Target& target = targets_[t];
            target.below += note.below[t];
            target.at_pivot += note.at_pivot[t];
            for (size_t b = 0; b < kBins; ++b) target.logged[b] += logged[t][b];
          }
          logs_.push_back(std::move(state.log));
        });
  }

  // The key of the threshold, how many are at or below it, and whether it was missed.
  struct Found {
    int64_t key = -1, at_or_below = 0;
    bool missed = false;
  };

  Found find(const Target& target) const {
    const int64_t k = rank_of(target.units, ranked_.counted);
    if (target.collapsed()) {
      const int64_t upto = target.below + target.at_pivot;
      return {target.bracket.pivot, upto, k <= target.below || k > upto};
    }
    int64_t before = target.below;
    for (int b = 0; b < target.first_bin; ++b) before += target.logged[static_cast<size_t>(b)];
    if (k == 0 && before == 0) return {};
    if (k <= before) return {int64_t{target.bracket.low} - 1, before, true};
    for (int b = target.first_bin; b <= target.last_bin; ++b) {
      const int64_t inside = target.logged[static_cast<size_t>(b)];
      if (k > before + inside) {
        before += inside;
        continue;
      }
      std::vector<uint32_t> keys;
      keys.reserve(static_cast<size_t>(inside));
      const auto low = static_cast<uint32_t>(target.start_of(b));
      const uint32_t span = static_cast<uint32_t>(target.end_of(b)) - low;
      uint32_t found[kTile + kLine];
      for (const Log& log : logs_) {
        for_each_part(0, log.logged, [&](int64_t from, int n) {
          const int count = tile_kernels().logged_between(&log.keys[from], n, low, span, found);
          keys.insert(keys.end(), found, found + count);
        });
      }
      std::nth_element(keys.begin(), keys.begin() + (k - before - 1), keys.end());
      const uint32_t key = keys[static_cast<size_t>(k - before - 1)];
      return {key,
              before + std::count_if(keys.begin(), keys.end(), [=](uint32_t x) { return x <= key; }),
              false};
    }
    return {target.bracket.high, before, true};
  }

  Selection resolve(BracketReport& report) {
    Selection selection;
    const Found high = find(targets_[0]);
    const Found low = targets_.size() > 1 ? find(targets_[1]) : Found();
    selection.high = high.key;
    selection.low = low.key;
    selection.kept = std::max<int64_t>(0, high.at_or_below - low.at_or_below);
    selection.ranked = ranked_.counted;
    selection.inactive = inactive_;
    selection.nonfinite = nonfinite_;
    selection.misses = high.missed || low.missed;
    const Bounds bounds = selection.bounds();
    std::atomic<int64_t> updated{0}, redone{0};
    // A share of every log for each thread: most that is wrong is in those of the first phases.
    torch::stable::parallel_for(0, kShares, 1, [&](int64_t begin, int64_t end) {
      FpMode mode;
      for (const Log& log : logs_) {
        updated += redo(log, log.logged * begin / kShares, log.logged * end / kShares, bounds, redone);
      }
    });
    counts_.updated += updated;
    report.redone = redone;
    spare_logs().give_back(std::move(logs_));
    return selection;
  }

  // fn(first entry, entries) for entries [begin, end) of a log, kTile at a time.
  template <typename Fn>
  static void for_each_part(int64_t begin, int64_t end, Fn fn) {
    for (; begin < end; begin += kTile) {
      fn(begin, static_cast<int>(std::min<int64_t>(kTile, end - begin)));
    }
  }

  int64_t redo(const Log& log, int64_t begin, int64_t end, Bounds bounds,
               std::atomic<int64_t>& redone) {
    struct Wrong {
      size_t index;
      int64_t element, entry;
    };
    std::vector<Wrong> wrong;
    size_t index = 0;
    for_each_part(begin, end, [&](int64_t from, int n) {
      int entries[kTile];
      const int count = tile_kernels().logged_wrongly(&log.keys[from], n, bounds, entries);
      for (int i = 0; i < count; ++i) {
        const int64_t entry = from + entries[i], place = log.places[static_cast<size_t>(entry)];
        if (wrong.empty()) index = segments_.find(place / kTile);
        while (index + 1 < segments_.size() && segments_[index + 1].first_tile * kTile <= place)
          ++index;
        wrong.push_back({index, place - segments_[index].first_tile * kTile, entry});
      }
    });
    redone += static_cast<int64_t>(wrong.size());
    constexpr size_t kAhead = 24;
    int64_t updated = 0;
    for (size_t i = 0; i < wrong.size(); ++i) {
      if (i + kAhead < wrong.size()) body_.prefetch(wrong[i + kAhead].index, wrong[i + kAhead].element);
      const auto entry = static_cast<size_t>(wrong[i].entry);
      const bool was = log.keys[entry] >= kInactiveKey;
      updated += body_.redo(wrong[i].index, wrong[i].element,
                            body_.updates() ? log.old[entry].data() : nullptr, !was);
    }
    return updated;
  }

  const Segments& segments_;
  const RiskSource& source_;
  const std::vector<size_t>& chosen_;
  std::vector<char> is_ranked_;
  BracketBody& body_;
  UpdateCounts& counts_;
  const Lines lines_;
  const Plan plan_;
  std::vector<Target> targets_;  // upper, lower if there is one
  Ranked ranked_;
  int64_t inactive_ = 0, nonfinite_ = 0;
  std::vector<Log> logs_;
};

}  // namespace

BracketReport& latest_bracket() {
  static thread_local BracketReport report;
  return report;
}

std::optional<Selection> bracket_pass(const Segments& segments, const RiskSource& source,
                                      const std::vector<size_t>& chosen,
                                      const BracketSettings& settings, BracketBody& body,
                                      UpdateCounts& counts) {
  BracketReport& report = latest_bracket() = BracketReport();
  const int64_t fewest = settings.width == 1.0 ? kFewest : kFewestInTests;
  if (source.segments.elements() < fewest) return std::nullopt;
  return Pass(segments, source, chosen, settings, body, counts).run(report);
}

}  // namespace cpu
}  // namespace rose
