#include "pass.h"

#include "logs.h"
#include "ranks.h"

namespace rose {
namespace cpu {
namespace {

constexpr int64_t kFewest = int64_t{1} << 20;  // elements; of fewer, the sample is too large a part
constexpr int64_t kFewestInTests = int64_t{1} << 16;
constexpr int64_t kLogAll = 1 << 17;  // elements: of so few, every key is logged, if keys alone are
constexpr int64_t kPartOfLog = 1024;  // entries of the log that are looked at together

// One call of bracket_pass().
class Pass {
 public:
  Pass(const Segments& segments, const Ranked& ranked, Body& body, UpdateCounts& counts)
      : segments_(segments),
        ranked_(ranked),
        is_ranked_(segments.size()),
        body_(body),
        counts_(counts),
        chunks_(segments.tiles()),
        counts_only_(body.logs() == Body::Logs::kKeys),
        others_count_(ranked.shared && !ranked.shared->others.empty()),
        lines_(ranked.source, stratum(ranked, counts_only_), ranked.draw) {
    for (const size_t i : ranked.chosen) is_ranked_[i] = 1;
    for (const int64_t units : {ranked.upper, ranked.lower}) {
      if (units == 0) continue;
      const double l = counts_only_ ? kLogOfFailureIfCounted : kLogOfFailure;
      thresholds_.emplace_back(units, lines_.weight(), ranked.width, l);
    }
    for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) ++left_[phase_of(chunk)];
  }

  std::optional<Selection> run(BracketReport& report) {
    const bool logs_all = counts_only_ && !ranked_.shared && segments_.elements() <= kLogAll;
    if (!logs_all && !(ranked_.shared ? share_sample(*ranked_.shared) : take_sample())) {
      return std::nullopt;
    }
    report.lines = logs_all ? 0 : lines_.size();
    for (size_t t = 0; t < thresholds_.size(); ++t) {
      Threshold& threshold = thresholds_[t];
      if (logs_all) threshold.log_all();
      if (!threshold.start() || !fits(threshold)) return std::nullopt;
      if (ranked_.shared) threshold.fix();
      report.first_low[t] = threshold.bracket().low;
      report.first_high[t] = threshold.bracket().high;
    }
    publish(0);
    body_.begin();
    walk();
    tighten_locked();  // if threads finished the last chunks together, none of them may have done it
    if (ranked_.shared) share_counts(*ranked_.shared);
    report.one_pass = 1;
    for (size_t t = 0; t < thresholds_.size(); ++t) {
      report.low[t] = thresholds_[t].bracket().low;
      report.high[t] = thresholds_[t].bracket().high;
      report.collapsed += thresholds_[t].collapsed();
    }
    const Selection selection = find();
    if (!counts_only_) redo(selection.bounds(), report);
    for (const auto& block : blocks_) report.logged += block->logged;
    spare_blocks().give_back(std::move(blocks_));
    spare_blocks().give_back(std::move(blocks_aside_));
    return selection;
  }

 private:
  // How many lines a sampled one stands for, of those of all processes that share the ranking.
  static int64_t stratum(const Ranked& ranked, bool counts_only) {
    const int64_t n = ranked.elements();
    const int64_t lines = ranked.shared ? n / kLine : Lines::count(ranked.source.segments);
    return strata_of(lines, lines_of_bracket(n, counts_only)).size;
  }

  size_t phase_of(int64_t chunk) const { return static_cast<size_t>(chunk * kPhases / chunks_.count); }

  bool take_sample() {
    std::vector<uint32_t> keys = lines_.some_keys(kFirstLines);
    std::vector<Window> windows;
    for (Threshold& threshold : thresholds_) windows.push_back(threshold.find_window(keys, 6));
    std::vector<Sample> samples = lines_.take(windows, [&](size_t index, int64_t start) {
      const int64_t tile = segments_[ranked_.chosen[index]].first_tile + start / kTile;
      return phase_of(tile / chunks_.size);
    });
    for (size_t t = 0; t < thresholds_.size(); ++t) thresholds_[t].set_sample(std::move(samples[t]));
    return true;
  }

  // Takes the sample of all processes, in windows around the thresholds of an earlier step. False if
  // there are none, or if processes do not know the same ones.
  bool share_sample(const Shared& shared) {
    std::vector<Window> windows;
    std::vector<Comparison> known{Comparison(static_cast<int32_t>(lines_.weight()))};
    bool all_known = true;
    for (size_t t = 0; t < thresholds_.size(); ++t) {
      known.emplace_back(shared.latest[t]);
      all_known = all_known && shared.latest[t] >= 0;
      windows.push_back(thresholds_[t].window_around(std::max(shared.latest[t], 0)));
    }
    Profile profiles[2];
    std::vector<Sample> samples = lines_.take(windows, [](size_t, int64_t) { return 0; }, profiles);
    for (size_t t = 0; t < thresholds_.size(); ++t) {
      thresholds_[t].set_sample(std::move(samples[t]), &profiles[t]);
    }
    Ranks(shared).add_up([&](auto visit) {
      for (Comparison& one : known) one.visit(visit);
      for (Threshold& threshold : thresholds_) threshold.visit_sample(visit);
    });
    for (const Comparison& one : known) all_known = all_known && one.alike();
    ranks_ = known[0].ranks();
    return all_known;
  }

  void share_counts(const Shared& shared) {
    Ranks(shared).add_up([&](auto visit) {
      for (int64_t* number : {&ranked_elements_, &inactive_, &nonfinite_}) visit(*number);
      for (Threshold& threshold : thresholds_) threshold.visit_counts(visit);
    });
  }

  // Sees to it that the log will be within its bytes, with room to be wrong. False if it cannot be.
  bool fits(Threshold& threshold) {
    // Bytes of an entry: of a key alone; or key, place, four numbers, and what blocks leave free.
    const double entry = counts_only_ ? 4 : 28;
    const int64_t elements = ranked_.shared ? ranked_.elements() / ranks_ : segments_.elements();
    const auto bytes = static_cast<double>(ranks_ * bytes_of_log(elements));
    const double room = bytes / (1.25 * entry) / static_cast<double>(thresholds_.size());
    constexpr double kShrinks = 0.75;  // the bracket shrinks during the pass: the share that is logged
    if (ranked_.shared) return threshold.inside() <= room || threshold.collapse_onto_middle();
    if (kShrinks * threshold.inside() <= room || threshold.collapse()) return true;
    return counts_only_ && kShrinks * threshold.set_pivot() <= room;
  }

  void publish(int phase) {
    Stage& stage = stages_[static_cast<size_t>(phase)];
    stage.count = static_cast<int>(thresholds_.size());
    for (size_t t = 0; t < thresholds_.size(); ++t) stage.brackets[t] = thresholds_[t].bracket();
    stage.bounds.high = thresholds_[0].estimate();
    if (thresholds_.size() > 1) stage.bounds.low = thresholds_[1].estimate();
    latest_.store(phase, std::memory_order_release);
  }

  // Looks for phases that have been counted. If another thread is looking already, it may see what this
  // one has counted, or not: then one that counts a later phase does, or run() at the end.
  void tighten() {
    std::unique_lock<std::mutex> lock(tightening_, std::try_to_lock);
    if (lock) tighten_locked();
  }

  void tighten_locked() {
    for (; counted_ < kPhases && left_[counted_].load(std::memory_order_acquire) == 0; ++counted_) {
      const int phase = static_cast<int>(counted_);
      {
        std::lock_guard<std::mutex> lock(registering_);
        for (const auto& tallies : tallies_) {
          ranked_elements_ += tallies->ranked[phase];
          for (size_t t = 0; t < thresholds_.size(); ++t) {
            thresholds_[t].count(phase, tallies->of[t]);
          }
        }
      }
      if (phase + 1 == kPhases) continue;
      for (Threshold& threshold : thresholds_) threshold.tighten(phase + 1, ranked_elements_);
      publish(phase + 1);
    }
  }

  // What one thread has counted.
  struct Tallies {
    int64_t ranked[kPhases] = {};
    std::vector<Tally> of;  // each threshold
  };

  Tallies& register_thread() {
    auto own = std::make_unique<Tallies>();
    own->of.resize(thresholds_.size());
    std::lock_guard<std::mutex> lock(registering_);
    tallies_.push_back(std::move(own));
    return *tallies_.back();
  }

  void walk() {
    std::mutex mutex;
    share_out(chunks_.count, [&](auto next) {
      ThreadLog log(body_.logs()), log_aside(body_.logs());
      Tallies& tallies = register_thread();
      UpdateCounts counts;
      int64_t inactive = 0, nonfinite = 0, at_pivot[2] = {};
      for (int64_t chunk = next(); chunk >= 0; chunk = next()) {
        const Stage& stage = stages_[static_cast<size_t>(latest_.load(std::memory_order_acquire))];
        const int64_t first_tile = chunks_.begin(chunk);
        Notes notes, aside;
        log.open(notes);
        if (others_count_) log_aside.open(aside);
        int64_t elements = 0;
        for_each_run(
            segments_, first_tile, chunks_.end(chunk), [&](size_t index, int64_t start, int n) {
              const bool is_aside = others_count_ && !is_ranked_[index];
              Notes& to = is_aside ? aside : notes;
              (is_aside ? log_aside : log).make_room(to, first_tile);
              const int64_t tile = segments_[index].first_tile + start / kTile - first_tile;
              body_.run(index, start, n, static_cast<uint32_t>(tile * kTile), stage, to, counts);
              if (is_ranked_[index]) elements += n;
            });
        log.close(notes, first_tile);
        if (others_count_) log_aside.close(aside, first_tile);
        count(phase_of(chunk), stage, notes, elements, log, tallies);
        inactive += notes.inactive;
        nonfinite += notes.nonfinite;
        for (int t = 0; t < 2; ++t) at_pivot[t] += notes.at_pivot[t];
      }
      std::lock_guard<std::mutex> lock(mutex);
      counts_.updated += counts.updated;
      counts_.nonfinite += counts.nonfinite;
      inactive_ += inactive;
      nonfinite_ += nonfinite;
      for (int t = 0; t < 2; ++t) at_pivot_[t] += at_pivot[t];
      for (auto& block : log.blocks()) blocks_.push_back(std::move(block));
      for (auto& block : log_aside.blocks()) blocks_aside_.push_back(std::move(block));
    });
  }

  // Adds what was noted of a chunk, which was treated by `stage`, to a thread's tallies. Its ranked
  // segments have so many `elements` there, and its keys are the latest of `log`.
  void count(size_t phase, const Stage& stage, const Notes& notes, int64_t elements,
             const ThreadLog& log, Tallies& tallies) {
    for (size_t t = 0; t < thresholds_.size(); ++t) {
      const Threshold& threshold = thresholds_[t];
      const Bracket bracket = stage.brackets[t];
      const auto low = static_cast<uint32_t>(bracket.low), pivot = static_cast<uint32_t>(bracket.pivot);
      const uint32_t span = static_cast<uint32_t>(bracket.high) - low;
      uint32_t* const bins = tallies.of[t].bins[phase];
      tallies.of[t].below[phase] += notes.below[t];
      if (bracket.pivot >= 0) bins[threshold.bin(pivot)] += static_cast<uint32_t>(notes.at_pivot[t]);
      log.for_each_recent_key([&](uint32_t key) {
        if (key - low <= span && key != pivot) ++bins[threshold.bin(key)];
      });
    }
    tallies.ranked[phase] += elements - notes.inactive - notes.nonfinite;
    if (left_[phase].fetch_sub(1, std::memory_order_acq_rel) == 1) tighten();
  }

  std::vector<uint32_t> logged_between(uint32_t low, uint32_t span) const {
    std::vector<uint32_t> keys;
    uint32_t found[kPartOfLog + kMostLanes];
    for (const auto& block : blocks_) {
      for (int64_t begin = 0; begin < block->logged; begin += kPartOfLog) {
        const int n = static_cast<int>(std::min(kPartOfLog, block->logged - begin));
        const int count = loops().logged_between(block->keys + begin, n, low, span, found);
        keys.insert(keys.end(), found, found + count);
      }
    }
    return keys;
  }

  Selection find() const {
    Selection selection;
    selection.ranked = ranked_elements_;
    Threshold::Found found[2];
    std::vector<int64_t> counts[2];
    for (size_t t = 0; t < thresholds_.size(); ++t) {
      const Threshold::Place place = thresholds_[t].place(selection.ranked);
      found[t] = place.found;
      if (place.span < 0) continue;
      std::vector<uint32_t> keys = logged_between(place.low, static_cast<uint32_t>(place.span));
      if (!ranked_.shared) {
        found[t] = thresholds_[t].find(place, std::move(keys), at_pivot_[t]);
        continue;
      }
      counts[t].resize(static_cast<size_t>(place.span) + 1);
      for (const uint32_t key : keys) ++counts[t][key - place.low];
    }
    if (ranked_.shared && !(counts[0].empty() && counts[1].empty())) {
      Ranks(*ranked_.shared).add_up([&](auto visit) {
        for (auto& of_threshold : counts) {
          for (int64_t& count : of_threshold) visit(count);
        }
      });
      for (size_t t = 0; t < thresholds_.size(); ++t) {
        if (!counts[t].empty()) {
          found[t] = Threshold::find(thresholds_[t].place(selection.ranked), counts[t]);
        }
      }
    }
    selection.high = found[0].key;
    selection.low = found[1].key;
    selection.kept = std::max<int64_t>(0, found[0].at_or_below - found[1].at_or_below);
    selection.inactive = inactive_;
    selection.nonfinite = nonfinite_;
    selection.misses = found[0].missed || found[1].missed;
    return selection;
  }

  // Treats again what was not treated as the thresholds `bounds` have it.
  void redo(Bounds bounds, BracketReport& report) {
    struct Part {
      const LogBlock* block;
      Piece piece;
    };
    std::vector<Part> parts;
    for (const auto* blocks : {&blocks_, &blocks_aside_}) {
      for (const auto& block : *blocks) {
        for (const Piece& piece : block->pieces) parts.push_back({block.get(), piece});
      }
    }
    std::atomic<int64_t> updated{0}, redone{0};
    share_out(static_cast<int64_t>(parts.size()), [&](auto next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const Part& part = parts[static_cast<size_t>(i)];
        for (int64_t begin = part.piece.begin; begin < part.piece.end; begin += kPartOfLog) {
          const int n = static_cast<int>(std::min(kPartOfLog, part.piece.end - begin));
          redo(*part.block, part.piece.first_tile, begin, n, bounds, updated, redone);
        }
      }
    });
    counts_.updated += updated;
    report.redone = redone;
  }

  // Of the entries [begin, begin + n) of a block of the log, whose places count from tile `first_tile`.
  void redo(const LogBlock& block, int64_t first_tile, int64_t begin, int n, Bounds bounds,
            std::atomic<int64_t>& updated, std::atomic<int64_t>& redone) {
    struct Element {
      size_t index;
      int64_t element;
    };
    uint32_t wrong[kPartOfLog + kMostLanes];
    Element elements[kPartOfLog];
    const int count = loops().logged_wrongly(block.keys + begin, n, bounds, wrong);
    if (count == 0) return;
    size_t index = segments_.find(first_tile + block.places[begin + wrong[0]] / kTile);
    for (int i = 0; i < count; ++i) {  // in the order of places
      const uint32_t place = block.places[begin + wrong[i]];
      const int64_t tile = first_tile + place / kTile;
      while (index + 1 < segments_.size() && segments_[index + 1].first_tile <= tile) ++index;
      elements[i] = {index, (tile - segments_[index].first_tile) * kTile + place % kTile};
      body_.prefetch(index, elements[i].element);
    }
    int64_t more = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t entry = begin + wrong[i];
      const float old[4] = {block.old[0][entry], block.old[1][entry], block.old[2][entry],
                            block.old[3][entry]};
      const bool was = block.keys[entry] >= kInactiveKey;
      more += body_.redo(elements[i].index, elements[i].element, old, !was);
    }
    updated += more;
    redone += count;
  }

  const Segments& segments_;
  const Ranked& ranked_;
  std::vector<char> is_ranked_;  // of each segment: whether this process counts it
  Body& body_;
  UpdateCounts& counts_;
  const Chunks chunks_;
  const bool counts_only_;   // nothing is updated: keys are all that is logged
  const bool others_count_;  // some ranked segments of this process are counted by another one
  const Lines lines_;
  std::vector<Threshold> thresholds_;                 // upper, lower if there is one
  std::array<std::atomic<int64_t>, kPhases> left_{};  // chunks of each phase that are not counted yet
  size_t counted_ = 0;                                // phases that are
  int64_t ranked_elements_ = 0;                       // elements in those
  std::mutex registering_;                            // guards tallies_
  std::vector<std::unique_ptr<Tallies>> tallies_;
  std::array<Stage, kPhases> stages_;  // of each phase
  std::atomic<int> latest_{0};         // which of them is known
  std::mutex tightening_;              // one thread at a time finds the next
  int64_t ranks_ = 1;                  // processes that share the ranking
  int64_t inactive_ = 0, nonfinite_ = 0, at_pivot_[2] = {};
  // The log: of elements that this process counts, and of those that other processes count.
  std::vector<std::unique_ptr<LogBlock>> blocks_, blocks_aside_;
};

}  // namespace

BracketReport& latest_bracket() {
  static thread_local BracketReport report;
  return report;
}

std::optional<Selection> bracket_pass(const Segments& segments, const Ranked& ranked, Body& body,
                                      UpdateCounts& counts) {
  BracketReport report;
  const bool counts_only = body.logs() == Body::Logs::kKeys;
  const int64_t fewest = ranked.width == 1.0 ? kFewest : kFewestInTests;
  std::optional<Selection> selection;
  if (counts_only || ranked.shared || ranked.elements() >= fewest) {
    selection = Pass(segments, ranked, body, counts).run(report);
  }
  if (!counts_only) latest_bracket() = report;
  return selection;
}

}  // namespace cpu
}  // namespace rose
