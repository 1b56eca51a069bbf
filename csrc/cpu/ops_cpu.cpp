#include "ops_cpu.h"

#include <cmath>
#include <cstring>
#include <mutex>

#include "../arguments.h"
#include "select.h"
#include "tiles.h"

namespace rose {
namespace cpu {
namespace {

float scalar_or(const std::optional<Tensor>& tensor, float otherwise, const char* name) {
  if (!tensor) return otherwise;
  check_table(*tensor, ScalarType::Float, 1, name);
  return *tensor->const_data_ptr<float>();
}

Selection read_selection(const Tensor& tensor) {
  check_table(tensor, ScalarType::Long, 8, "selection");
  Selection selection;
  std::memcpy(&selection, tensor.const_data_ptr(), sizeof selection);
  return selection;
}

RiskSource risk_source(const Segments& segments, const Groups& groups, bool second_order,
                       bool rank_inactive, const std::optional<Tensor>& inv_scale) {
  RiskSource source{segments, second_order, rank_inactive, scalar_or(inv_scale, 1.0f, "inv_scale"), {}};
  source.alpha.resize(segments.size());
  for (size_t i = 0; i < segments.size(); ++i) source.alpha[i] = groups.alpha(i);
  return source;
}

// Adds a captured mask to the masks of each tensor.
void add_masks(const std::vector<Tensor>& tensors, const Segments& segments, const char* name,
               int32_t weight, const uint8_t* Masks::* bits, std::vector<Masks>& masks) {
  const auto kinds = check_masks(tensors, segments, name, torch::headeronly::DeviceType::CPU);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto* data = static_cast<const uint8_t*>(tensors[i].const_data_ptr());
    if (kinds[i] == MaskKind::kBits) {
      masks[i].*bits = data;
    } else if (kinds[i] == MaskKind::kAll || *data != 0) {
      masks[i].base += weight;
    }
  }
}

}  // namespace

Tensor select(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
              std::optional<Tensor> inv_scale, int64_t upper, int64_t lower, bool rank_inactive,
              bool approx) {
  FpMode mode;
  check_fractions(upper, lower);
  const Segments segments(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, segments.size());
  const Selection selection = select(
      risk_source(segments, groups, !exp_avgs.empty(), rank_inactive, inv_scale), upper, lower, approx);
  Tensor result = torch::stable::empty({8}, ScalarType::Long);
  std::memcpy(result.mutable_data_ptr(), &selection, sizeof selection);
  return result;
}

void capture_(std::vector<Tensor> masks, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              Tensor hyper, Tensor group, std::optional<Tensor> inv_scale, Tensor selection,
              bool rank_inactive) {
  FpMode mode;
  const Segments segments(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, segments.size());
  const RiskSource source = risk_source(segments, groups, !exp_avgs.empty(), rank_inactive, inv_scale);
  const Bounds bounds = read_selection(selection).bounds();
  STD_TORCH_CHECK(masks.size() == segments.size(), "masks has ", masks.size(),
                  " tensors; expected one for each of ", segments.size(), " gradients");
  std::vector<uint8_t*> bits(masks.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    check_table(masks[i], ScalarType::Byte, (segments[i].n + 7) / 8, "masks");
    bits[i] = masks[i].mutable_data_ptr<uint8_t>();
  }
  struct State {
    float scratch[3 * kTile];
  };
  for_each_tile(
      segments, [] { return State(); },
      [&](State& state, size_t index, int64_t start, int n) {
        const Risk risk = source.risk(index, start, n, state.scratch);
        tile_kernels().pack(risk, n, bounds, bits[index] + start / 8);
      },
      [](State&) {});
}

Tensor adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
              std::vector<Tensor> first_masks, std::vector<Tensor> second_masks,
              std::optional<Tensor> selection, Tensor lr, Tensor hyper, Tensor group, Tensor offsets,
              std::optional<Tensor> inv_scale, std::optional<Tensor> found_inf, double gamma,
              bool rank_inactive, int64_t seed) {
  FpMode mode;
  const Segments segments({{"params", &params, true},
                           {"grads", &grads, false},
                           {"exp_avgs", &exp_avgs, true},
                           {"exp_avg_sqs", &exp_avg_sqs, true}},
                          kTile);
  const size_t count = segments.size();
  const Groups groups(hyper, group, count);
  check_table(lr, ScalarType::Double, groups.count(), "lr");
  check_table(offsets, ScalarType::Long, static_cast<int64_t>(count), "offsets");
  STD_TORCH_CHECK(steps.size() == count, "steps has ", steps.size(),
                  " tensors; expected one for each of ", count, " parameters");
  for (const Tensor& step : steps) check_table(step, ScalarType::Float, 1, "steps");
  STD_TORCH_CHECK(!selection || second_masks.empty(),
                  "both selection and second_masks are given; expected one second-order mask");
  const bool has_first = !first_masks.empty(), has_second = selection || !second_masks.empty();
  Masks shared;
  shared.fractional = has_first && has_second;
  shared.first_weight = shared.fractional ? 1 : 3;
  shared.second_weight = shared.fractional ? 2 : 3;
  shared.rank_inactive = rank_inactive;
  shared.from_risk = selection.has_value();
  if (selection) shared.bounds = read_selection(*selection).bounds();
  std::vector<Masks> masks(count, shared);
  if (has_first) {
    add_masks(first_masks, segments, "first_masks", shared.first_weight, &Masks::first_bits, masks);
  }
  if (!second_masks.empty()) {
    add_masks(second_masks, segments, "second_masks", shared.second_weight, &Masks::second_bits, masks);
  }
  const float unscale = scalar_or(inv_scale, 1.0f, "inv_scale");
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(groups[i].selective == 0 || has_first || has_second, "params[", i,
                    "] is selective; expected first_masks, second_masks or a selection");
    masks[i].alpha = groups.alpha(i);
  }

  Tensor result = torch::stable::empty({2}, ScalarType::Long);
  int64_t* totals = result.mutable_data_ptr<int64_t>();
  totals[0] = totals[1] = 0;
  if (scalar_or(found_inf, 0.0f, "found_inf") != 0) return result;

  const double* lrs = lr.const_data_ptr<double>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  std::vector<Update> updates(count);
  std::vector<uint32_t> random_keys(count);
  for (size_t i = 0; i < count; ++i) {
    const float step = *steps[i].mutable_data_ptr<float>() += 1.0f;
    updates[i] = make_update(groups[i], lrs[groups.row(i)], step, gamma);
    random_keys[i] = random_key(static_cast<uint32_t>(seed), static_cast<uint32_t>(step));
  }

  struct State {
    float p[kTile], g[kTile], m[kTile], v[kTile], scaled[kTile];
    UpdateCounts counts;
  };
  std::mutex mutex;
  const auto body = [&](State& state, size_t index, int64_t start, int n) {
    const TileKernels& kernels = tile_kernels();
    const Segment& segment = segments[index];
    const std::vector<Operand>& operands = segment.operands;
    float* p = load(segment, operands[0], start, n, state.p);
    const float* g = load(segment, operands[1], start, n, state.g);
    float* m = load(segment, operands[2], start, n, state.m);
    float* v = load(segment, operands[3], start, n, state.v);
    const float factor = static_cast<float>(groups[index].sign) * unscale;
    if (factor != 1.0f) {
      kernels.scale(g, factor, n, state.scaled);
      g = state.scaled;
    }
    if (groups[index].selective == 0) {
      kernels.adamw(p, m, v, g, n, updates[index]);
      state.counts.updated += n;
    } else {
      Masks here = masks[index];
      if (here.first_bits) here.first_bits += start / 8;
      if (here.second_bits) here.second_bits += start / 8;
      kernels.masked_adamw(p, m, v, g, here, n, updates[index], state.counts);
    }
    store(segment, operands[0], start, n, p);
    store(segment, operands[2], start, n, m);
    if (operands[3].dtype == Dtype::kBFloat16) {
      store_stochastic(segment, operands[3], start, n, v, random_keys[index], offset[index] + start);
    } else {
      store(segment, operands[3], start, n, v);
    }
  };
  for_each_tile(
      segments, [] { return State(); }, body,
      [&](State& state) {
        std::lock_guard<std::mutex> lock(mutex);
        totals[0] += state.counts.updated;
        totals[1] += state.counts.nonfinite;
      });
  return result;
}

Tensor tensor_norms(std::vector<Tensor> tensors, std::optional<Tensor> inv_scale) {
  FpMode mode;
  const Segments segments({{"tensors", &tensors, false}}, kTile);
  const float factor = scalar_or(inv_scale, 1.0f, "inv_scale");
  std::vector<double> sums(static_cast<size_t>(segments.tiles()));
  struct State {
    float values[2 * kTile];
  };
  for_each_tile(
      segments, [] { return State(); },
      [&](State& state, size_t index, int64_t start, int n) {
        const Segment& segment = segments[index];
        const float* x = load(segment, segment.operands[0], start, n, state.values);
        if (factor != 1.0f) {
          tile_kernels().scale(x, factor, n, state.values + kTile);
          x = state.values + kTile;
        }
        sums[static_cast<size_t>(segment.first_tile + start / kTile)] =
            tile_kernels().sum_of_squares(x, n);
      },
      [](State&) {});
  const int64_t count = static_cast<int64_t>(segments.size());
  Tensor result = torch::stable::empty({count}, ScalarType::Float);
  float* norms = result.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    const Segment& segment = segments[static_cast<size_t>(i)];
    double sum = 0;
    for (int64_t t = 0; t * kTile < segment.n; ++t) {
      sum += sums[static_cast<size_t>(segment.first_tile + t)];
    }
    norms[i] = static_cast<float>(std::sqrt(sum));
  }
  return result;
}

}  // namespace cpu
}  // namespace rose
