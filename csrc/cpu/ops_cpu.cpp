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

constexpr auto kCpu = torch::headeronly::DeviceType::CPU;

Selection selection_of(const Tensor& record) {
  Selection selection;
  std::memcpy(static_cast<void*>(&selection), read_record(record, kCpu), sizeof selection);
  return selection;
}

Tensor record_of(const Selection& selection, std::initializer_list<int64_t> more = {}) {
  const int64_t size = kFields + static_cast<int64_t>(more.size());
  Tensor result = torch::stable::empty({size}, ScalarType::Long);
  auto* words = write_to<int64_t>(result);
  std::memcpy(words, &selection, sizeof selection);
  std::copy(more.begin(), more.end(), words + kFields);
  return result;
}

// Gradients and, for second order, first moments, with all that makes keys of them, and what is asked.
struct RankedTensors {
  Segments segments;
  Groups groups;
  RiskSource source;
  Ranked ranked;

  RankedTensors(const Tensors& grads, const Tensors& exp_avgs, const Tensor& hyper, const Tensor& group,
                const Factors& factors, const Ranking& wanted)
      : segments(risk_roles(grads, exp_avgs), kTile),
        groups(hyper, group, segments.size()),
        source{
            segments, !exp_avgs.empty(), wanted.rank_inactive, {factors.inv_scale, factors.clip}, {}},
        ranked{source,
               {},
               wanted.upper,
               wanted.lower,
               wanted.draw,
               wanted.bracket_width,
               wanted.shared ? &*wanted.shared : nullptr} {
    for (size_t i = 0; i < segments.size(); ++i) {
      source.alpha.push_back(groups.alpha(i));
      ranked.chosen.push_back(i);
    }
  }
};

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

// A ranking and what it is for.
Selection rank_and_use(const Segments& segments, const Ranked& ranked, Mode mode, Body& body,
                       UpdateCounts& counts) {
  if (mode == Mode::kApprox && ranked.source.segments.elements() >= kFewestOfApprox) {
    latest_bracket() = BracketReport();
    return given_pass(segments, ranked.chosen, approx_thresholds(ranked), body, counts);
  }
  if (mode == Mode::kBracket) {
    if (const auto selection = bracket_pass(segments, ranked, body, counts)) return *selection;
  }
  if (ranked.shared) return nothing_done();
  const Selection selection = select(ranked);
  given_pass(segments, ranked.chosen, selection, body, counts);
  return selection;
}

// A ranking of some of the tensors, and what it is for.
Selection rank_some_and_use(std::vector<size_t> chosen, const Segments& segments, const Groups& groups,
                            const Tensors& grads, const Tensors& exp_avgs, const Tensor& hyper,
                            const Factors& factors, const Ranking& wanted, Body& body,
                            UpdateCounts& counts) {
  if (wanted.shared) {
    const std::vector<size_t>& others = wanted.shared->others;
    for (auto other = others.rbegin(); other != others.rend(); ++other) {
      ROSE_CHECK(*other < chosen.size(), "ranking has ", *other, " among those that others count, of ",
                 chosen.size(), " tensors that are ranked; expected indices of these, in order");
      chosen.erase(chosen.begin() + static_cast<int64_t>(*other));
    }
  }
  Tensors chosen_grads, chosen_exp_avgs;
  Tensor rows = torch::stable::empty({static_cast<int64_t>(chosen.size())}, ScalarType::Long);
  auto* row = write_to<int64_t>(rows);
  for (const size_t i : chosen) {
    chosen_grads.push_back(grads[i]);
    if (!exp_avgs.empty()) chosen_exp_avgs.push_back(exp_avgs[i]);
    *row++ = groups.row(i);
  }
  RankedTensors ranking(chosen_grads, chosen_exp_avgs, hyper, rows, factors, wanted);
  ranking.ranked.chosen = std::move(chosen);
  return rank_and_use(segments, ranking.ranked, wanted.mode, body, counts);
}

bool is_set(const MaybeTensor& found_inf) {
  if (!found_inf) return false;
  check_table(*found_inf, ScalarType::Float, 1, "found_inf");
  return *read_from<float>(*found_inf, "found_inf") != 0;
}

}  // namespace

Tensor latest_bracket_report() {
  constexpr int64_t kNumbers = sizeof(BracketReport) / sizeof(int64_t);
  Tensor result = torch::stable::empty({kNumbers}, ScalarType::Long);
  std::memcpy(static_cast<void*>(write_to<int64_t>(result)), &latest_bracket(), sizeof(BracketReport));
  return result;
}

Tensor Operators::rank_(Tensors masks, Tensors grads, Tensors exp_avgs, Tensor hyper, Tensor group,
                        MaybeTensor inv_scale, MaybeTensor clip, MaybeTensor record, Integers ranking) {
  FpMode mode;
  const Ranking wanted(ranking, record, false, true);
  const RankedTensors of(grads, exp_avgs, hyper, group, Factors(inv_scale, clip), wanted);
  const bool counts_only = wanted.shared ? wanted.mode == Mode::kExact : masks.empty();
  if (counts_only && wanted.finds()) {
    return record_of(select(of.ranked, wanted.mode == Mode::kApprox));
  }
  Capturer capturer(of.source, mask_bits(masks, of.segments, kCpu));
  UpdateCounts none;
  if (wanted.shared) {
    return record_of(rank_some_and_use(of.ranked.chosen, of.segments, of.groups, grads, exp_avgs, hyper,
                                       Factors(inv_scale, clip), wanted, capturer, none));
  }
  if (wanted.finds()) {
    return record_of(rank_and_use(of.segments, of.ranked, wanted.mode, capturer, none));
  }
  const Selection given = selection_of(*record);
  given_pass(of.segments, of.ranked.chosen, given, capturer, none);
  return record_of(given);
}

Tensor Operators::step_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                        Tensors steps, Tensors first_masks, Tensors second_masks, MaybeTensor record,
                        Tensor lr, Tensor hyper, Tensor group, Tensor offsets, MaybeTensor inv_scale,
                        MaybeTensor clip, MaybeTensor found_inf, double gamma, Integers ranking,
                        Integers rounding) {
  FpMode mode;
  const Ranking wanted(ranking, record, true, true);
  const UpdatePlan plan({params, grads, exp_avgs, exp_avg_sqs, steps, first_masks, second_masks},
                        {lr, hyper, group, offsets}, wanted, kCpu, kTile);
  const Factors factors(inv_scale, clip);
  Updater updater(plan, factors, gamma, wanted, Rounding(rounding));
  Selection selection = record ? selection_of(*record) : Selection();
  UpdateCounts counts;
  if (is_set(found_inf)) return record_of(Selection(), {0, 0});
  if (!wanted.finds()) {
    given_pass(plan.segments, {}, selection, updater, counts);
  } else {
    selection = rank_some_and_use(plan.selective, plan.segments, plan.groups, grads, exp_avgs, hyper,
                                  factors, wanted, updater, counts);
  }
  return record_of(selection, {counts.updated, counts.nonfinite});
}

Tensor Operators::count_keys(Tensors grads, Tensors exp_avgs, Tensor hyper, Tensor group,
                             MaybeTensor inv_scale, MaybeTensor clip, bool rank_inactive,
                             MaybeTensor digits) {
  FpMode mode;
  Ranking wanted({}, std::nullopt, true);
  wanted.rank_inactive = rank_inactive;
  const RankedTensors of(grads, exp_avgs, hyper, group, Factors(inv_scale, clip), wanted);
  std::vector<int64_t> counts;
  if (digits) {
    check_table(*digits, ScalarType::Long, digits->numel(), "digits");
    const auto* const values = read_from<int64_t>(*digits, "digits");
    for (int64_t i = 0; i < digits->numel(); ++i) {
      ROSE_CHECK(values[i] >= 0 && values[i] < kHighDigits, "digits[", i, "] is ", values[i],
                 "; expected 0 to ", kHighDigits - 1, ", what the upper bits of keys are");
      const auto of_digit = cpu::count_keys(of.source, static_cast<uint32_t>(values[i]));
      counts.insert(counts.end(), of_digit.begin(), of_digit.end());
    }
  } else {
    counts = cpu::count_keys(of.source, std::nullopt);
  }
  Tensor result = torch::stable::empty({static_cast<int64_t>(counts.size())}, ScalarType::Long);
  std::copy(counts.begin(), counts.end(), write_to<int64_t>(result));
  return result;
}

Tensor Operators::sums_of_squares(Tensors tensors, MaybeTensor inv_scale) {
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

Tensor Operators::clip_factors(Tensor sums, double max_norm) {
  FpMode mode;
  check_table(sums, ScalarType::Double, sums.numel(), "sums");
  const double* const from = read_from<double>(sums, "sums");
  Tensor result = torch::stable::empty({3}, ScalarType::Float);
  write_clip_factors(std::accumulate(from, from + sums.numel(), 0.0), static_cast<float>(max_norm),
                     write_to<float>(result));
  return result;
}

Tensor Operators::select_tensors_(Tensor mask, Tensor sums, MaybeTensor exp_avg_sums, Tensor hyper,
                                  Tensor group, MaybeTensor clip, int64_t upper, int64_t lower,
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
