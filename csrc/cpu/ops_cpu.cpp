#include "ops_cpu.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "../check.h"
#include "rose/norms.h"
#include "select.h"
#include "update.h"

namespace rose {
namespace cpu {
namespace {

Selection read_selection(const Tensor& tensor) {
  check_table(tensor, ScalarType::Long, 8, "selection");
  Selection selection;
  std::memcpy(static_cast<void*>(&selection), read_from<int64_t>(tensor, "selection"),
              sizeof selection);
  return selection;
}

Tensor record_of(const Selection& selection, std::initializer_list<int64_t> more = {}) {
  Tensor result = torch::stable::empty({8 + static_cast<int64_t>(more.size())}, ScalarType::Long);
  auto* words = write_to<int64_t>(result);
  std::memcpy(words, &selection, sizeof selection);
  std::copy(more.begin(), more.end(), words + 8);
  return result;
}

// Gradients and, for second order, first moments, with all that makes keys of them, and what is asked.
struct Ranking {
  Segments segments;
  Groups groups;
  RiskSource source;
  Ranked ranked;

  Ranking(const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs, const Tensor& hyper,
          const Tensor& group, const Factors& factors, bool rank_inactive, int64_t upper = 0,
          int64_t lower = 0, int64_t draw = 0, double width = 1)
      : segments(risk_roles(grads, exp_avgs), kTile),
        groups(hyper, group, segments.size()),
        source{segments, !exp_avgs.empty(), rank_inactive, {factors.inv_scale, factors.clip}, {}},
        ranked{source, {}, upper, lower, static_cast<uint32_t>(draw), width} {
    for (size_t i = 0; i < segments.size(); ++i) {
      source.alpha.push_back(groups.alpha(i));
      ranked.chosen.push_back(i);
    }
  }
};

// Where captured masks are written.
std::vector<uint8_t*> mask_bits(const std::vector<Tensor>& masks, const Segments& segments) {
  ROSE_CHECK(masks.size() == segments.size(), "masks has ", masks.size(),
             " tensors; expected one for each of ", segments.size(), " gradients");
  std::vector<uint8_t*> bits(masks.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    check_table(masks[i], ScalarType::Byte, (segments[i].n + 7) / 8, "masks");
    bits[i] = write_to<uint8_t>(masks[i], {"masks", static_cast<int64_t>(i)});
  }
  return bits;
}

class Capturer final : public Body {
 public:
  Capturer(const RiskSource& source, std::vector<uint8_t*> bits)
      : source_(source), bits_(std::move(bits)) {}

  void run(size_t index, int64_t start, int n, uint32_t place, const Stage& stage, Notes& notes,
           UpdateCounts&) override {
    Buffers buffers;
    Run run = source_.open(index, start, n, buffers);
    run.place = place;
    loops().rank(run, source_.risk(index), stage, bits_[index] + start / 8, notes);
  }
  int redo(size_t index, int64_t element, const float*, bool) override {
    // Elements of one byte are in one chunk, and so in the hands of one thread.
    bits_[index][element / 8] ^= static_cast<uint8_t>(1 << element % 8);
    return 0;
  }
  void prefetch(size_t index, int64_t element) const override {
    __builtin_prefetch(bits_[index] + element / 8, 1);
  }
  Logs logs() const override { return Logs::kPlaces; }

 private:
  const RiskSource& source_;
  std::vector<uint8_t*> bits_;
};

// The ranking and its use, in as few passes as there can be.
Selection rank_and_use(const Segments& segments, const Ranked& ranked, bool approx, Body& body,
                       UpdateCounts& counts) {
  if (approx && ranked.source.segments.elements() >= kFewestOfApprox) {
    latest_bracket() = BracketReport();
    return given_pass(segments, ranked.chosen, approx_thresholds(ranked), body, counts);
  }
  if (!approx) {
    if (const auto selection = bracket_pass(segments, ranked, body, counts)) return *selection;
  }
  const Selection selection = select(ranked);
  given_pass(segments, ranked.chosen, selection, body, counts);
  return selection;
}

bool is_set(const std::optional<Tensor>& found_inf) {
  if (!found_inf) return false;
  check_table(*found_inf, ScalarType::Float, 1, "found_inf");
  return *read_from<float>(*found_inf, "found_inf") != 0;
}

}  // namespace

Tensor latest_bracket_report() {
  constexpr int64_t kFields = sizeof(BracketReport) / sizeof(int64_t);
  Tensor result = torch::stable::empty({kFields}, ScalarType::Long);
  std::memcpy(static_cast<void*>(write_to<int64_t>(result)), &latest_bracket(), sizeof(BracketReport));
  return result;
}

Tensor select(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip, int64_t upper, int64_t lower,
              bool rank_inactive, bool approx, int64_t draw) {
  FpMode mode;
  check_fractions(upper, lower);
  const Ranking ranking(grads, exp_avgs, hyper, group, Factors(inv_scale, clip), rank_inactive, upper,
                        lower, draw);
  return record_of(select(ranking.ranked, approx));
}

void capture_(std::vector<Tensor> masks, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              Tensor hyper, Tensor group, std::optional<Tensor> inv_scale, std::optional<Tensor> clip,
              Tensor selection, bool rank_inactive) {
  FpMode mode;
  const Ranking ranking(grads, exp_avgs, hyper, group, Factors(inv_scale, clip), rank_inactive);
  const Selection given = read_selection(selection);
  Capturer capturer(ranking.source, mask_bits(masks, ranking.segments));
  UpdateCounts none;
  given_pass(ranking.segments, ranking.ranked.chosen, given, capturer, none);
}

Tensor bracket_capture_(std::vector<Tensor> masks, std::vector<Tensor> grads,
                        std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
                        std::optional<Tensor> inv_scale, std::optional<Tensor> clip, int64_t upper,
                        int64_t lower, bool rank_inactive, int64_t draw, double width, bool approx) {
  FpMode mode;
  check_fractions(upper, lower);
  const Ranking ranking(grads, exp_avgs, hyper, group, Factors(inv_scale, clip), rank_inactive, upper,
                        lower, draw, width);
  Capturer capturer(ranking.source, mask_bits(masks, ranking.segments));
  UpdateCounts none;
  return record_of(rank_and_use(ranking.segments, ranking.ranked, approx, capturer, none));
}

Tensor adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
              std::vector<Tensor> first_masks, std::vector<Tensor> second_masks,
              std::optional<Tensor> selection, Tensor lr, Tensor hyper, Tensor group, Tensor offsets,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip,
              std::optional<Tensor> found_inf, double gamma, bool rank_inactive, int64_t seed,
              bool stochastic) {
  FpMode mode;
  ROSE_CHECK(!selection || second_masks.empty(),
             "both selection and second_masks are given; expected one second-order mask");
  Updater updater(
      {params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, second_masks}, lr, hyper, group,
      offsets, Factors(inv_scale, clip),
      {gamma, selection.has_value(), rank_inactive, static_cast<uint32_t>(seed), stochastic});
  const Selection given = selection ? read_selection(*selection) : Selection();
  UpdateCounts counts;
  if (!is_set(found_inf)) {
    updater.begin();
    given_pass(updater.segments(), {}, given, updater, counts);
  }
  Tensor result = torch::stable::empty({2}, ScalarType::Long);
  auto* words = write_to<int64_t>(result);
  words[0] = counts.updated;
  words[1] = counts.nonfinite;
  return result;
}

Tensor bracket_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                      std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> steps, std::vector<Tensor> first_masks, Tensor lr,
                      Tensor hyper, Tensor group, Tensor offsets, std::optional<Tensor> inv_scale,
                      std::optional<Tensor> clip, std::optional<Tensor> found_inf, double gamma,
                      int64_t upper, int64_t lower, bool rank_inactive, int64_t seed, bool stochastic,
                      int64_t draw, double width, bool approx) {
  FpMode mode;
  check_fractions(upper, lower);
  const Factors factors(inv_scale, clip);
  std::vector<Tensor> no_masks;
  Updater updater({params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, no_masks}, lr, hyper,
                  group, offsets, factors,
                  {gamma, true, rank_inactive, static_cast<uint32_t>(seed), stochastic});
  if (is_set(found_inf)) return record_of(Selection(), {0, 0});

  std::vector<size_t> chosen;
  std::vector<Tensor> chosen_grads, chosen_exp_avgs;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (updater.groups()[i].selective == 0) continue;
    chosen.push_back(i);
    chosen_grads.push_back(grads[i]);
    chosen_exp_avgs.push_back(exp_avgs[i]);
  }
  Tensor chosen_group = torch::stable::empty({static_cast<int64_t>(chosen.size())}, ScalarType::Long);
  auto* rows = write_to<int64_t>(chosen_group);
  for (size_t i = 0; i < chosen.size(); ++i) rows[i] = updater.groups().row(chosen[i]);
  Ranking ranking(chosen_grads, chosen_exp_avgs, hyper, chosen_group, factors, rank_inactive, upper,
                  lower, draw, width);
  ranking.ranked.chosen = std::move(chosen);
  updater.begin();
  UpdateCounts counts;
  const Selection selection = rank_and_use(updater.segments(), ranking.ranked, approx, updater, counts);
  return record_of(selection, {counts.updated, counts.nonfinite});
}

Tensor sums_of_squares(std::vector<Tensor> tensors, std::optional<Tensor> inv_scale) {
  FpMode mode;
  const Segments segments({{"tensors", &tensors, false}}, kTile);
  const float factor = Factors(inv_scale, std::nullopt).inv_scale;
  std::vector<double> sums(static_cast<size_t>(segments.tiles()));
  const Chunks chunks(segments.tiles());
  share_out(chunks.count, [&](auto next) {
    Buffers buffers;
    for (int64_t chunk = next(); chunk >= 0; chunk = next()) {
      for_each_run(
          segments, chunks.begin(chunk), chunks.end(chunk), [&](size_t index, int64_t start, int n) {
            const Run run = open_run(segments[index], start, n, buffers);
            double* sum = &sums[static_cast<size_t>(segments[index].first_tile + start / kTile)];
            for (int done = 0; done < n; done += kTile) {
              *sum++ = loops().sum_of_squares(run.data[0] + done * run.item(0), run.dtypes[0],
                                              std::min(kTile, n - done), factor);
            }
          });
    }
  });
  const int64_t count = static_cast<int64_t>(segments.size());
  Tensor result = torch::stable::empty({count}, ScalarType::Double);
  double* totals = write_to<double>(result);
  for (int64_t i = 0; i < count; ++i) {
    const Segment& segment = segments[static_cast<size_t>(i)];
    const auto first = sums.begin() + segment.first_tile;
    totals[i] = std::accumulate(first, first + (segment.n + kTile - 1) / kTile, 0.0);
  }
  return result;
}

Tensor clip_factors(Tensor sums, double max_norm) {
  FpMode mode;
  check_table(sums, ScalarType::Double, sums.numel(), "sums");
  const double* const from = read_from<double>(sums, "sums");
  Tensor result = torch::stable::empty({3}, ScalarType::Float);
  write_clip_factors(std::accumulate(from, from + sums.numel(), 0.0), static_cast<float>(max_norm),
                     write_to<float>(result));
  return result;
}

Tensor select_tensors_(Tensor mask, Tensor sums, std::optional<Tensor> exp_avg_sums, Tensor hyper,
                       Tensor group, std::optional<Tensor> clip, int64_t upper, int64_t lower,
                       bool rank_inactive) {
  FpMode mode;
  check_tensors(mask, sums, exp_avg_sums, upper, lower);
  const size_t count = static_cast<size_t>(mask.numel());
  const Groups groups(hyper, group, count);
  const float factor = Factors(std::nullopt, clip).clip;
  bool* const chosen = write_to<bool>(mask, "mask");
  const double* const squares = read_from<double>(sums, "sums");
  const double* const of_moments =
      exp_avg_sums ? read_from<double>(*exp_avg_sums, "exp_avg_sums") : nullptr;
  Selection selection;
  std::vector<uint32_t> keys, ranked;
  for (size_t i = 0; i < count; ++i) {
    const float norm = mul(norm_of(squares[i]), factor);
    const uint32_t key = of_moments == nullptr ? first_order_key(norm, rank_inactive)
                                               : second_order_key(norm, norm_of(of_moments[i]),
                                                                  groups.alpha(i), rank_inactive);
    keys.push_back(key);
    selection.inactive += key == kInactiveKey;
    if (key < kInactiveKey) ranked.push_back(key);
  }
  std::sort(ranked.begin(), ranked.end());
  selection.ranked = static_cast<int64_t>(ranked.size());
  selection.nonfinite = static_cast<int64_t>(count) - selection.ranked - selection.inactive;
  const auto threshold = [&](int64_t fraction) {
    const Quantile quantile = quantile_of(fraction, selection.ranked);
    const auto at = [&](int64_t index) { return ranked[static_cast<size_t>(index)]; };
    return static_cast<int64_t>(between(at(quantile.index), at(quantile.next), quantile.weight));
  };
  if (!ranked.empty()) {
    selection.high = threshold(upper);
    selection.low = threshold(lower) - 1;
  }
  for (size_t i = 0; i < count; ++i) {
    chosen[i] = if_selected(keys[i], selection.bounds(), 1) != 0;
    selection.kept += chosen[i] && keys[i] < kInactiveKey;
  }
  return record_of(selection);
}

}  // namespace cpu
}  // namespace rose
