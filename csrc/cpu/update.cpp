#include "update.h"

#include <cstring>

#include "../check.h"

namespace rose {
namespace cpu {
namespace {

constexpr size_t kWritten[3] = {0, 2, 3};  // operands: p, m, v

MaskOfRun mask_of(const Mask& mask) {
  if (mask.kind == MaskKind::kBits) return {mask.data, false};
  return {nullptr, mask.kind == MaskKind::kAll || (mask.kind == MaskKind::kWhole && *mask.data != 0)};
}

}  // namespace

Factors::Factors(const std::optional<Tensor>& scale, const std::optional<Tensor>& norm)
    : inv_scale(1), clip(1), plain_clip(1) {
  if (scale) {
    check_table(*scale, ScalarType::Float, 1, "inv_scale");
    inv_scale = *read_from<float>(*scale, "inv_scale");
  }
  if (norm) {
    check_table(*norm, ScalarType::Float, 2, "clip");
    const auto* factors = read_from<float>(*norm, "clip");
    clip = factors[0];
    plain_clip = factors[1];
  }
}

Updater::Updater(const UpdatePlan& plan, const Factors& factors, double gamma, const Ranking& wanted,
                 const Rounding& rounding)
    : plan_(plan),
      factors_(factors),
      gamma_(gamma),
      from_risk_(wanted.ranks),
      rank_inactive_(wanted.rank_inactive),
      rounding_(rounding) {
  for (const auto& [first, second] : plan.masks) {
    const Mask& alone = second.kind == MaskKind::kNone ? first : second;
    masks_.push_back(plan.fractional ? Masks{mask_of(first), mask_of(second)}
                                     : Masks{{}, mask_of(alone)});
  }
}

void Updater::begin() {
  updates_.resize(plan_.segments.size());
  random_keys_.resize(plan_.segments.size());
  for (size_t i = 0; i < plan_.segments.size(); ++i) {
    const float step = *plan_.steps[i] = next_step(*plan_.steps[i]);
    updates_[i] = make_update(plan_.groups[i], plan_.lr[plan_.groups.row(i)], step, gamma_);
    random_keys_[i] = random_key(rounding_.seed, step_word(step));
  }
}

Step Updater::step_of(size_t index, int64_t start) const {
  const uint64_t global = static_cast<uint64_t>(plan_.offsets[index] + start);
  Step step;
  step.update = &updates_[index];
  step.ranked = from_risk_;
  step.fractional = plan_.fractional;
  step.first = masks_[index].first;
  step.second = masks_[index].second;
  if (step.first.bits) step.first.bits += start / 8;
  if (step.second.bits) step.second.bits += start / 8;
  step.stochastic = rounding_.stochastic;
  step.random_index = static_cast<uint32_t>(global);
  for (uint32_t k = 0; k < 2; ++k) {
    step.random_keys[k] = mix((static_cast<uint32_t>(global >> 32) + k) ^ random_keys_[index]);
  }
  return step;
}

void Updater::run(size_t index, int64_t start, int n, uint32_t place, const Stage& stage, Notes& notes,
                  UpdateCounts& counts) {
  const Segment& segment = plan_.segments[index];
  Buffers buffers;
  Run run = open_run(segment, start, n, buffers);
  run.factors[0] = static_cast<float>(plan_.groups[index].sign) * factors_.inv_scale;
  run.factors[1] = plan_.groups[index].selective != 0 ? factors_.clip : factors_.plain_clip;
  run.place = place;
  const Step step = step_of(index, start);
  const auto none = [](const MaskOfRun& mask) { return mask.bits == nullptr && !mask.all; };
  if (plan_.groups[index].selective == 0) {
    loops().adamw(run, step);
    counts.updated += n;
  } else if (!step.ranked && none(step.first) && none(step.second)) {
    loops().decay(run, step);
    return write_back(segment, start, run, 3);
  } else {
    const Risk risk = {true, rank_inactive_, plan_.groups.alpha(index)};
    loops().masked(run, step, risk, stage, notes, counts);
  }
  for (const size_t k : kWritten) write_back(segment, start, run, k);
}

void Updater::prefetch(size_t index, int64_t element) const {
  for (const size_t k : kWritten) {
    const Operand& operand = plan_.segments[index].operands[k];
    if (operand.linear) __builtin_prefetch(operand.data + element * operand.element_size(), 1);
  }
}

int Updater::redo(size_t index, int64_t element, const float* old, bool selected) {
  const Segment& segment = plan_.segments[index];
  const MaskOfRun first = masks_[index].first;
  const bool has_first =
      plan_.fractional && (first.bits ? first.bits[element / 8] >> (element % 8) & 1 : first.all);
  float values[3] = {old[0], old[1], old[2]};
  const int weight = (has_first ? plan_.weights.first : 0) + (selected ? plan_.weights.second : 0);
  if (plan_.fractional) {
    adamw_element<true>(values[0], values[1], values[2], old[3], weight, updates_[index]);
  } else {
    adamw_element<false>(values[0], values[1], values[2], old[3], weight, updates_[index]);
  }
  for (int k = 0; k < 3; ++k) {
    const Operand& to = segment.operands[kWritten[k]];
    char* const place = place_of(segment, to, element);
    const auto what = k == 0 ? Rounded::kParameter : Rounded::kSecondMoment;
    if (to.dtype == Dtype::kFloat32) {
      std::memcpy(place, &values[k], sizeof(float));
      continue;
    }
    uint16_t half;
    if (to.dtype == Dtype::kFloat16) {
      half = float_to_half(values[k]);
    } else if (k == 2 || (k == 0 && rounding_.stochastic)) {
      const auto global = static_cast<uint64_t>(plan_.offsets[index] + element);
      half = float_to_bf16_stochastic(values[k], rounding_bits(random_keys_[index], global, what));
    } else {
      half = float_to_bf16(values[k]);
    }
    std::memcpy(place, &half, sizeof half);
  }
  return (weight != 0) - (has_first || !selected);
}

}  // namespace cpu
}  // namespace rose
