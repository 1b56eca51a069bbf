// What is ranked, and samples of it: lines, of kLine elements, one from each of many equal strata. See
// sampled() in rose_ops/definitions.py.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <numeric>
#include <vector>

#include "runs.h"

namespace rose {
namespace cpu {

// Where keys come from: operand 0 of every segment is the gradient, operand 1 (second order) the first
// moment before the step.
struct RiskSource {
  const Segments& segments;
  bool second_order, rank_inactive;
  float factors[2];          // that gradients are multiplied by
  std::vector<float> alpha;  // per segment

  Risk risk(size_t index) const { return {second_order, rank_inactive, alpha[index]}; }
  Run open(size_t index, int64_t start, int n, Buffers& buffers) const {
    Run run = open_run(segments[index], start, n, buffers);
    run.factors[0] = factors[0];
    run.factors[1] = factors[1];
    return run;
  }
};

// Parts of the index space, by tiles, that are one after the other.
constexpr int kPhases = 16;
constexpr int kBins = 2048;  // of a window

// What a sample has of one phase, by one threshold: lines' counts, and their keys inside the window. Of
// elements that are ranked (r) and of those at or below the window's middle, too (c), sums of products
// of differences between neighbouring lines.
struct PhaseSample {
  int64_t ranked = 0, below = 0, cc = 0, cr = 0, rr = 0;
  std::vector<uint32_t> keys;
};

// The sums with c at the end of each cell of the window, where it is not known which is close to the
// threshold.
// And how many keys each bin of the window has, and how many are under its middle and at it: this is
// instead of the keys.
struct Profile {
  static constexpr int kCells = 32;
  int64_t cc[kCells] = {}, cr[kCells] = {};
  int64_t bins[kBins] = {}, under_middle = 0, at_middle = 0;
};

// The smallest one by which a window has at most so many parts.
inline int shift_of(Window window, int parts) {
  int shift = 0;
  while ((window.high - window.low) >> shift >= static_cast<uint32_t>(parts)) ++shift;
  return shift;
}
typedef std::array<PhaseSample, kPhases> Sample;

// Of a first sample, that says where to look. The variance is taken at its guess of the threshold: a
// worse one makes brackets wider (by 4% where half of the lines are empty and there are half as many of
// these).
constexpr int64_t kFirstLines = 512;

// How many lines a bracket's sample should have.
int64_t lines_of_bracket(int64_t elements, bool counts_only);

class Lines {
 public:
  // One line of every `stratum` of them.
  Lines(const RiskSource& source, int64_t stratum, uint32_t draw);

  static int64_t count(const Segments& segments);

  int64_t size() const { return strata_.count; }
  // Lines that a sampled one stands for.
  double weight() const { return static_cast<double>(strata_.size); }

  // The sample, by each of `windows`. `phase_of`: of element `start` of segment `index`. `profiles`: of
  // each window, in the place of keys; or null. There is one phase then.
  template <typename PhaseOf>
  std::vector<Sample> take(const std::vector<Window>& windows, PhaseOf phase_of,
                           Profile* profiles = nullptr) const;

  // Ranked keys of about `wanted` of the lines.
  std::vector<uint32_t> some_keys(int64_t wanted) const;

 private:
  struct Place {
    size_t index;
    int64_t start;
    int n;  // 0: the last stratum is shorter than the others, and its line is not there
  };
  // A segment; those of one kind have the same dtypes and the same alpha.
  struct Source {
    int64_t first_line;
    const char* data[2];
    int64_t items[2];  // bytes
    bool linear;
    int kind;
  };
  static constexpr int kBatch = 64;
  struct Batch {
    Place places[kBatch];
    SampledLine lines[kBatch];
    int size = 0;
    char buffers[kBatch][2][kLine * sizeof(float)];  // of what is not contiguous
  };

  Place place(int64_t line, size_t index) const;
  // Fills a batch with lines first, first + step, ... before last, of one kind, and fetches them;
  // returns the line to go on with. `index` is that of an earlier line, or 0.
  int64_t plan(Batch& batch, int64_t first, int64_t last, int64_t step, size_t& index) const;
  // body(first line of a batch, batch) for lines first, first + step, ... before last. Lines are far
  // apart: while one batch is at work, the next one is on its way.
  template <typename Body>
  void for_each_batch(int64_t first, int64_t last, int64_t step, Body body) const {
    Batch batches[2];
    size_t index = 0;
    int64_t next = plan(batches[0], first, last, step, index);
    for (int k = 0; first < last; k = 1 - k) {
      const int64_t after = plan(batches[1 - k], next, last, step, index);
      body(first, batches[k]);
      first = next;
      next = after;
    }
  }

  void count(const Batch& batch, const std::vector<Window>& windows, LineCounts* counts,
             uint32_t* const* room) const;

  const RiskSource& source_;
  std::vector<Source> sources_;  // and one behind the last
  uint32_t key_;
  Strata strata_;
};

void add(PhaseSample& to, const PhaseSample& from);
void add(Profile& to, const Profile& from);

// Of a line and the one after it.
class ProfileOfLines {
 public:
  explicit ProfileOfLines(Window window)
      : window_(window),
        shift_(shift_of(window, Profile::kCells)),
        bin_shift_(shift_of(window, kBins)) {}

  // `keys` are those inside the window. A last line without neighbour is alone.
  void add(const LineCounts& of_line, const uint32_t* keys, bool is_second, bool is_alone) {
    int* const upto = upto_[is_second];
    std::fill(upto, upto + Profile::kCells, 0);
    for (int i = 0; i < of_line.inside; ++i) {
      const uint32_t key = keys[i], offset = key - window_.low;
      ++upto[offset >> shift_];
      ++profile_.bins[offset >> bin_shift_];
      profile_.under_middle += key < window_.middle;
      profile_.at_middle += key == window_.middle;
    }
    upto[0] += of_line.below;
    std::partial_sum(upto, upto + Profile::kCells, upto);
    ranked_[is_second] = of_line.ranked;
    if (!is_second && !is_alone) return;
    const int r = ranked_[0] - (is_alone ? 0 : ranked_[1]);
    for (int k = 0; k < Profile::kCells; ++k) {
      const int c = upto_[0][k] - (is_alone ? 0 : upto_[1][k]);
      profile_.cc[k] += c * c;
      profile_.cr[k] += c * r;
    }
  }
  const Profile& profile() const { return profile_; }

 private:
  Window window_;
  int shift_, bin_shift_, upto_[2][Profile::kCells], ranked_[2];
  Profile profile_;
};

template <typename PhaseOf>
std::vector<Sample> Lines::take(const std::vector<Window>& windows, PhaseOf phase_of,
                                Profile* profiles) const {
  constexpr int64_t kShare = 512;  // lines, an even number: pairs stay together
  const size_t targets = windows.size();
  std::vector<Sample> total(targets);
  std::mutex mutex;
  share_out((size() + kShare - 1) / kShare, [&](auto next) {
    std::vector<Sample> own(targets);
    std::vector<ProfileOfLines> own_profiles(windows.begin(), windows.end());
    std::vector<uint32_t> inside[2];
    for (auto& keys : inside) keys.resize(kBatch * kLine + kMostLanes);
    LineCounts counts[kBatch * 2];
    for (int64_t share = next(); share >= 0; share = next()) {
      const int64_t end = std::min(size(), (share + 1) * kShare);
      LineCounts earlier[2] = {};
      for_each_batch(share * kShare, end, 1, [&](int64_t first, const Batch& batch) {
        uint32_t* const room[2] = {inside[0].data(), inside[1].data()};
        count(batch, windows, counts, room);
        const auto phase_at = [&](int i) {
          return static_cast<size_t>(phase_of(batch.places[i].index, batch.places[i].start));
        };
        const size_t from = phase_at(0), to = phase_at(batch.size - 1);
        for (size_t t = 0; t < targets; ++t) {
          const uint32_t* keys = room[t];
          for (int i = 0; i < batch.size; ++i) {
            const LineCounts& of_line = counts[static_cast<size_t>(i) * targets + t];
            PhaseSample& sample = own[t][from == to ? from : phase_at(i)];
            sample.ranked += of_line.ranked;
            sample.below += of_line.below;
            if (from != to) sample.keys.insert(sample.keys.end(), keys, keys + of_line.inside);
            // Of a last line without neighbour, the square itself is an upper bound.
            const int64_t line = first + i;
            const bool alone = line % 2 == 0 && line + 1 == size();
            if (profiles) own_profiles[t].add(of_line, keys, line % 2 == 1, alone);
            keys += of_line.inside;
            if (line % 2 == 1 || alone) {
              const int c = of_line.upto_middle - (alone ? 0 : earlier[t].upto_middle);
              const int r = of_line.ranked - (alone ? 0 : earlier[t].ranked);
              sample.cc += c * c;
              sample.cr += c * r;
              sample.rr += r * r;
            }
            earlier[t] = of_line;
          }
          if (from == to && !profiles)
            own[t][from].keys.insert(own[t][from].keys.end(), inside[t].data(),
                                     inside[t].data() + (keys - room[t]));
        }
      });
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t t = 0; t < targets; ++t) {
      for (size_t j = 0; j < kPhases; ++j) add(total[t][j], own[t][j]);
      if (profiles) add(profiles[t], own_profiles[t].profile());
    }
  });
  return total;
}

}  // namespace cpu
}  // namespace rose
